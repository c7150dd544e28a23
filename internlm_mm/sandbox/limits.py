"""What one session of the sandbox may use."""

from dataclasses import dataclass, fields

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one session. Each holds for all its processes together unless it says otherwise.

    Attributes:
        seconds: Wall-clock time of a cell. Then it is interrupted, and what was defined stays.
        grace_seconds: How long a cell may go on after that before its session is killed.
        cpu_seconds: Processor time of a cell.
        memory_mb: Memory, files in the session's folder included. Also the address space of each
            process, so that one that asks for too much gets a `MemoryError` and lives.
        processes: Processes and threads.
        open_files: Open files of each process.
        file_mb: Size of one file.
        disk_mb: Size of all files.
        files: Number of files and folders.
        output_chars: Bytes of standard output, and as many of standard error, that a reply keeps;
            characters of a result and of an error, likewise.
        output_mb: Output after which a cell is interrupted.
        code_kb: Size of a cell.
        images: Number of images of a reply.
        image_mb: Size of one image.
        image_megapixels: Number of pixels of one image.
    """

    seconds: float = 10.0
    grace_seconds: float = 2.0
    cpu_seconds: float = 60.0
    memory_mb: int = 1024
    processes: int = 64
    open_files: int = 128
    file_mb: int = 64
    disk_mb: int = 128
    files: int = 10_000
    output_chars: int = 20_000
    output_mb: int = 8
    code_kb: int = 256
    images: int = 8
    image_mb: int = 4
    image_megapixels: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int,) if field.type is int or field.type == 'int' else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
                wanted = 'a whole number' if kinds == (int,) else 'a number'
                raise ValueError(f'{field.name}={value!r} must be {wanted} above 0')
        if self.memory_mb < 64:
            raise ValueError(f'memory_mb={self.memory_mb} is less than Python needs: 64 at least')
        if self.processes < 4:
            raise ValueError(f'processes={self.processes} is less than a session needs: 4 at least')
        if self.open_files < 32:
            raise ValueError(f'open_files={self.open_files} is less than Python needs: 32 at least')

    @property
    def reply_bytes(self) -> int:
        """Size of the largest reply that a worker which keeps the limits may send."""
        # Text as ASCII JSON takes up to 12 bytes a character; images are in base64.
        return 12 * 8 * self.output_chars + self.images * self.image_mb * MIB * 4 // 3 + MIB
