"""Curves without images."""

from types import SimpleNamespace

from mmengine.visualization import Visualizer

from internlm_mm.registry import VISUALIZERS


@VISUALIZERS.register_module()
class ScalarVisualizer(Visualizer):
    """MMEngine's Visualizer for numbers only.

    It sets up no figure, which takes a second and memory.

    Args and use as MMEngine's; `vis_backends` takes any backend by name.
    """

    def _initialize_fig(self, fig_cfg: dict) -> tuple:  # noqa: ARG002  MMEngine's signature
        return None, SimpleNamespace(get_dpi=lambda: 100), None
