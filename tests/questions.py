"""Small files of questions in the forms that they are published in."""

import csv
import json
import random
from pathlib import Path

SUBJECTS = ('high_school_math', 'law')


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    path.write_text(text, encoding='utf-8')
    return path


def sums(count: int, seed: int = 0) -> list[tuple[str, list[str], int]]:
    """Questions on small sums, four options each, and which is right."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        one, other = draw.randrange(50), draw.randrange(50)
        options = draw.sample([str(one + other + step) for step in (-7, -1, 0, 5)], 4)
        found.append((f'{one} + {other} =', options, options.index(str(one + other))))
    return found


def write_mmlu(folder: Path, count: int = 4, shots: int = 3) -> Path:
    """`dev` and `test` of two subjects, as csv without header; a comma and a line end inside."""
    for split, number, seed in (('dev', shots, 100), ('test', count, 0)):
        for index, subject in enumerate(SUBJECTS):
            path = folder / split / f'{subject}_{split}.csv'
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open('w', newline='') as file:
                writer = csv.writer(file)
                for question, options, answer in sums(number, seed + index):
                    text = f'"Add", please:\n{question}' if index else question
                    writer.writerow([text, *options, 'ABCD'[answer]])
    return folder


def write_ceval(folder: Path, count: int = 4, shots: int = 3) -> Path:
    """`dev` with explanations and `val` of two subjects, as csv with a header."""
    for split, number, seed in (('dev', shots, 100), ('val', count, 0)):
        for index, subject in enumerate(SUBJECTS):
            path = folder / split / f'{subject}_{split}.csv'
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open('w', newline='', encoding='utf-8-sig') as file:
                names = ['id', 'question', 'A', 'B', 'C', 'D', 'answer', 'explanation']
                writer = csv.writer(file)
                writer.writerow(names[: 8 if split == 'dev' else 7])
                for number_, (question, options, answer) in enumerate(sums(number, seed + index)):
                    row = [number_, f'计算：{question}', *options, 'ABCD'[answer]]
                    writer.writerow(row + (['因为'] if split == 'dev' else []))
    return folder


def write_gsm8k(folder: Path, count: int = 4) -> Path:
    """`train.jsonl` and `test.jsonl` of word problems."""
    for split, seed in (('train', 100), ('test', 0)):
        rows = [
            {
                'question': f'Compute {question[:-2]}, please.',
                'answer': f'It is <<{question}{options[right]}>>.\n#### {options[right]}',
            }
            for question, options, right in sums(count, seed)
        ]
        write_jsonl(folder / f'{split}.jsonl', rows)
    return folder
