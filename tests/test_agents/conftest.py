from tests.test_tokenizers.conftest import byte_vocabulary, exported, internlm_vocabulary

__all__ = ['byte_vocabulary', 'exported', 'internlm_vocabulary']
