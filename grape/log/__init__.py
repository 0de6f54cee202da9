"""The critique log: a DuckDB file beside a spool, written exactly once and asked in SQL.

`tables` and `views` are what it holds, `record` and `spool` how rows wait on disk, `database` the short connections,
`writer` the one way in, and `query` the read-only way out.
"""

from grape.log.database import Busy, read
from grape.log.writer import Log, recover, spool_folder

__all__ = ["Busy", "Log", "read", "recover", "spool_folder"]
