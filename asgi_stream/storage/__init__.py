"""The long-term record of events in OpenSearch: written off the hot path, searched, and followed live from there.

document   an event as a document; index, template                                       (pure)
search     requests and their answers; from where to go on live                          (pure)
bulk       writing documents, and what became of each
sink       what publishers hand over: queue, thread, spool
spool      documents that wait in files
recording  a broker that hands over what it appends
archiver   `asgi-stream archiver`: the record's writer as a process of its own
opensearch `OpenSearchEventStorage`: all of it in one object
"""

from asgi_stream.config import StorageConfig
from asgi_stream.storage.opensearch import OpenSearchEventStorage
from asgi_stream.storage.search import SearchPage, StoredEvent
from asgi_stream.storage.sink import SinkStats

__all__ = ["OpenSearchEventStorage", "SearchPage", "SinkStats", "StorageConfig", "StoredEvent"]
