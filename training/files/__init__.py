"""Files of runs: written whole or line by line, and read with limits, without following links."""

from training.files.access import (
    FULL_DISK,
    MAX_JSON_BYTES,
    NotPlain,
    names_in,
    open_plain,
    parse_json,
    plain,
    read_json,
    read_plain,
    sync_folder,
    write_atomic,
)
from training.files.lines import (
    MAX_LINES_BYTES,
    Lines,
    append_line,
    line_blocks,
    newest_record,
    newest_records,
    read_lines,
    records_in,
)

__all__ = [
    "FULL_DISK",
    "MAX_JSON_BYTES",
    "MAX_LINES_BYTES",
    "Lines",
    "NotPlain",
    "append_line",
    "line_blocks",
    "names_in",
    "newest_record",
    "newest_records",
    "open_plain",
    "parse_json",
    "plain",
    "read_json",
    "read_lines",
    "read_plain",
    "records_in",
    "sync_folder",
    "write_atomic",
]
