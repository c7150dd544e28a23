"""The whole verification: reference, layouts one after the other, cells."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from internlm_mm.engine.preflight import build_data_part
from internlm_mm.registry import DATASETS, MODELS
from internlm_mm.utils.config import dump_config, load_config
from internlm_mm.utils.config_check import check_config
from internlm_mm.verify.compare import (
    LIMIT_OF_ONE,
    MISSING,
    TOLERANCE,
    Cell,
    Differences,
    Recording,
    bitwise_differences,
    bounds_of,
    differences,
    initial_differences,
    judge,
)
from internlm_mm.verify.layouts import Case, names, why_not
from internlm_mm.verify.processes import (
    LayoutError,
    LayoutRefusedError,
    Processes,
    run_processes,
)
from internlm_mm.verify.reference import Reference, train_reference
from internlm_mm.verify.shrink import (
    LR,
    STEPS,
    WARMUP,
    Shrunk,
    micro_batches,
    shrink,
    with_precision,
)
from internlm_mm.verify.worker import SAVED

PAIRS = ('ring', 'all', 'none')
"""Which checkpoints a layout resumes from: the one before it, every other, or none."""


@dataclass(slots=True)
class Report:
    """What came out in one precision.

    Attributes:
        precision: Name of the dtype.
        cells: All checks of all layouts.
        skipped: Layouts that cannot run, with reasons.
        errors: Layouts that failed to, with the last lines of the log.
    """

    precision: str
    cells: list[Cell] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing deviates."""
        return all(cell.passed for cell in self.cells)


class Verification:
    """Compares layouts of one config with the reference.

    Args:
        config: The user's, checked.
        cases: Layouts; one process is put in front if it is not there.
        precisions: Names of dtypes to compute in.
        folder: Scratch space.
        device: 'cpu' or 'cuda'.
        processes: Processes there may be.
        random_data: Take random tokens, not the config's data.
        pairs: See `PAIRS`.
        prelude: `module:function` that every process calls first; for tests.

    Raises:
        ValueError: If the config cannot be verified.
        FileNotFoundError: If its data is missing.
    """

    def __init__(
        self,
        config: Config,
        cases: Sequence[Case],
        precisions: Sequence[str],
        folder: Path,
        *,
        device: str = 'cpu',
        processes: int = 4,
        random_data: bool = False,
        pairs: str = 'ring',
        prelude: str | None = None,
    ) -> None:
        self.folder, self.device, self.prelude, self.pairs = folder, device, prelude, pairs
        cases = list(cases) if Case() in cases else [Case(), *cases]
        names(cases)
        fitting = [case for case in cases if case.world_size <= processes]
        self.small: Shrunk = shrink(config, fitting, device, random_data)
        init_default_scope('internlm_mm')
        self._rows = self._build_rows()
        reasons = {case.name: self._why_not(case, processes) for case in cases}
        self.skipped = {name: reason for name, reason in reasons.items() if reason is not None}
        self.cases = [case for case in cases if case.name not in self.skipped]
        self.expected: Reference = self._reference()
        self._config = self._write_config()
        self.reports = [Report(name, skipped=self.skipped) for name in precisions]
        self._single: dict[str, Differences] = {}
        self._processes = Processes([], device, prelude)

    def _why_not(self, case: Case, processes: int) -> str | None:
        with torch.device('meta'):
            model = MODELS.build(deepcopy(self.small.model))
        seq_len = self.small.dataset['seq_len']
        packed = self._rows[0].max_docs > 1
        return why_not(case, model, seq_len, micro_batches(case), processes, packed)

    def _micro_rows(self, case: Case) -> int:
        return self.small.rows // case.data // micro_batches(case)

    def _build_rows(self) -> Any:
        small = self.small
        rows = build_data_part(
            DATASETS, small.dataset['dataset'], 'train_dataloader.dataset', seed=small.seed
        )
        outer = {key: value for key, value in small.dataset.items() if key != 'dataset'}
        return DATASETS.build(dict(outer, dataset=rows), default_args={'seed': small.seed})

    def _reference(self) -> Reference:
        small = self.small
        return train_reference(
            lambda: MODELS.build(deepcopy(small.model)),
            self._rows,
            seed=small.seed,
            steps=STEPS,
            rows_of_a_step=small.rows,
            betas=small.betas,
            weight_decay=small.weight_decay,
            rate=lambda step: LR * (step + 1) / WARMUP,
            max_norm=small.max_norm,
            device=self.device,
        )

    def _write_config(self) -> Path:
        """The small config with the clip and eps that the reference took."""
        content = deepcopy(self.small.config)
        content['optim_wrapper']['clip_grad'] = {'max_norm': self.expected.max_norm}
        content['optim_wrapper']['optimizer']['eps'] = self.expected.eps
        path = self.folder / 'config.json'
        path.write_text(dump_config(Config(content))[1])
        check_config(load_config(path))
        return path

    def run(self, tell: Callable[[str], object]) -> list[Report]:
        """Everything. One report a precision.

        Args:
            tell: Called with a line when a layout begins, and with what became of it: whoever stops
                a long run knows that much.

        Raises:
            ValueError: If not even one process can train the config.
        """
        sizes = [case.world_size for case in self.cases]
        # Those that come last resume checkpoints of layouts that came later than themselves.
        sizes += {'ring': sizes[:1], 'all': sizes, 'none': []}[self.pairs]
        self._processes = Processes(sizes, self.device, self.prelude)
        try:
            return self._run(tell)
        finally:
            self._processes.close()

    def _run(self, tell: Callable[[str], object]) -> list[Report]:
        for number, case in enumerate(self.cases):
            tell(f'{number + 1}/{len(self.cases)} {case.name}')
            done = [one for one in self.cases[:number] if one.name not in self.skipped]
            before = done[-1:] if self.pairs == 'ring' else []
            try:
                self.run_case(case, before)
                tell(f'    {self._verdict(case)}')
            except LayoutRefusedError as error:
                if case == Case():
                    raise ValueError(f'one process: {error}') from error
                self.skipped[case.name] = str(error)
        self.cases = [case for case in self.cases if case.name not in self.skipped]
        if self.pairs != 'none' and len(self.cases) > 1:
            tell('checkpoints of layouts that come later')
        if self.pairs == 'ring' and len(self.cases) > 1:
            self.run_resumes(self.cases[0], self.cases[-1:])
        elif self.pairs == 'all':
            for case in self.cases:
                self.run_resumes(case, [other for other in self.cases if other != case])
        return self.reports

    def run_case(self, case: Case, before: Sequence[Case]) -> None:
        """Train on a layout, resume its own checkpoint, and those of others."""
        tasks = []
        for report in self.reports:
            tasks.append(self._task(case, report.precision, 'train'))
            if self.pairs != 'none':
                own = self._checkpoint(case, report.precision)
                tasks.append(self._task(case, report.precision, 'again', own))
            tasks += self._resumes(case, report, before)
        error = self._start(case, tasks)
        for report in self.reports:
            if error is not None:
                report.errors[case.name] = error
            self._judge_training(case, report)
            self._judge_resumes(case, report, before)

    def run_resumes(self, case: Case, others: Sequence[Case]) -> None:
        """Resume the checkpoints of other layouts."""
        tasks = [task for report in self.reports for task in self._resumes(case, report, others)]
        if not tasks:
            return
        error = self._start(case, tasks)
        for report in self.reports:
            if error is not None:
                report.errors.setdefault(case.name, error)
            self._judge_resumes(case, report, others)

    # ------------------------------------------------------------------------------- running

    def _resumes(self, case: Case, report: Report, others: Sequence[Case]) -> list[dict]:
        found = []
        for other in others:
            path = self._checkpoint(other, report.precision)
            if path.exists():  # the other has failed otherwise, and says so itself
                found.append(self._task(case, report.precision, _from(other), path))
        return found

    def _task(self, case: Case, precision: str, run: str, resume: Path | None = None) -> dict:
        folder = self._run_folder(case, precision, run)
        folder.mkdir(parents=True, exist_ok=True)
        strategy = case.options(with_precision(self.small.config['strategy'], precision))
        return {
            'config': str(self._config),
            'options': {
                'strategy': strategy,
                'train_cfg.micro_batch_size': self._micro_rows(case),
            },
            'folder': str(folder),
            'exponents': self.expected.exponents,
            'resume': resume and str(resume),
        }

    def _start(self, case: Case, tasks: Sequence[Mapping[str, Any]]) -> str | None:
        job = self._case_folder(case) / 'job.json'
        job.write_text(json.dumps(tasks))
        try:
            run_processes(job, self._processes.take(case.world_size))
        except LayoutRefusedError:
            raise
        except LayoutError as error:
            return str(error)
        return None

    def _case_folder(self, case: Case) -> Path:
        return self.folder / case.name.replace('/', '-').replace(' ', '_')

    def _run_folder(self, case: Case, precision: str, run: str) -> Path:
        return self._case_folder(case) / precision / run.replace('/', '-').replace(' ', '_')

    def _checkpoint(self, case: Case, precision: str) -> Path:
        return self._run_folder(case, precision, 'train') / f'iter_{SAVED}'

    def _read(self, case: Case, precision: str, run: str) -> Recording | None:
        folder = self._run_folder(case, precision, run)
        try:
            return Recording(folder, case.world_size)
        except FileNotFoundError:  # a process failed before it came so far
            return None

    # ------------------------------------------------------------------------------- judging

    def _judge_training(self, case: Case, report: Report) -> None:
        run = self._read(case, report.precision, 'train')
        if run is None:
            checks = ('initial', 'loss', 'norm', 'gradients', 'weights')
            report.cells += [_not_run(case, check) for check in checks]
            return
        masters = initial_differences(run, self.expected)
        report.cells.append(judge(case.name, 'initial', masters, 0.0))
        found = differences(run, self.expected)
        single = self._single.get(report.precision)
        bounds = bounds_of(report.precision, single, self.expected)
        if case == Case():
            self._single[report.precision] = found
        for check, values in found.items():
            bound = bounds if isinstance(bounds, float) else bounds[check]
            named = check in ('gradients', 'weights')
            report.cells.append(judge(case.name, check, values, bound, named))
        if self.pairs != 'none':
            again = self._read(case, report.precision, 'again')
            if again is None:
                report.cells.append(_not_run(case, 'same resume'))
            else:
                values = bitwise_differences(again, run)
                bound = self._repetition_bound(report.precision)
                report.cells.append(judge(case.name, 'same resume', values, bound))

    def _repetition_bound(self, precision: str) -> float:
        """How far two runs of the same may be apart: not a bit, where kernels are deterministic."""
        if self.device == 'cpu' or self.small.config['randomness']['deterministic']:
            return 0.0
        if precision in TOLERANCE:
            return TOLERANCE[precision]
        single = self._single.get(precision)
        # What rounding does.
        return max(single['gradients'].values()) if single else LIMIT_OF_ONE[precision]

    def _judge_resumes(self, case: Case, report: Report, others: Sequence[Case]) -> None:
        for other in others:
            if not self._checkpoint(other, report.precision).exists():
                continue
            check = f'resume from {other.name}'
            run = self._read(case, report.precision, _from(other))
            if run is None:
                report.cells.append(_not_run(case, check))
                continue
            single = self._single.get(report.precision)
            bounds = bounds_of(report.precision, single, self.expected)
            cells = []
            for kind, values in differences(run, self.expected).items():
                bound = bounds if isinstance(bounds, float) else bounds[kind]
                named = kind in ('gradients', 'weights')
                cells.append(judge(case.name, check, values, bound, named))
            failed = [cell for cell in cells if not cell.passed]
            worst = max(cell.max_relative_difference for cell in cells)
            first = failed[-1] if failed else cells[0]  # weights or gradients name a parameter
            # A wrong checkpoint is the other's fault; its own cells are red, too.
            blamed = first.detail and not self._is_right(other, report)
            detail = f'{first.detail} (as after {other.name}, which deviates itself)'
            report.cells.append(
                replace(
                    first,
                    max_relative_difference=worst,
                    detail=detail if blamed else first.detail,
                )
            )

    def _verdict(self, case: Case) -> str:
        cells = [cell for r in self.reports for cell in r.cells if cell.layout == case.name]
        failed = [cell.check for cell in cells if not cell.passed]
        if failed:
            return (
                f'{len(failed)} of {len(cells)} checks failed: {", ".join(dict.fromkeys(failed))}'
            )
        return f'{len(cells)} checks passed'

    def _is_right(self, case: Case, report: Report) -> bool:
        return all(cell.passed for cell in report.cells if cell.layout == case.name)


def _from(other: Case) -> str:
    return f'from {other.name}'


def _not_run(case: Case, check: str) -> Cell:
    return Cell(case.name, check, MISSING, False, None, MISSING, 'a process failed before it')


def default_processes(device: str) -> int:
    """Processes that a machine is good for: a GPU each, or four on the CPU."""
    return torch.cuda.device_count() if device == 'cuda' else 4
