"""A bucket in this process, behind the part of Cloud Storage's JSON API that its clients here use.

gcsfs, tensorstore, google-cloud-storage and tensorboardX speak to it as they do to the real one
(`environment` says where it is); programs under test are other processes, and may be killed.
As there, an object is written whole or not at all, a name is not a folder, and nothing can be
appended or renamed.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib

NAME = 'fake'
ROOT = f'gs://{NAME}'


@dataclasses.dataclass(frozen=True)
class Object:
  content: bytes
  generation: int
  updated: float

  def resource(self, name):
    stamp = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(self.updated)) + '.000Z'
    digest = lambda content: base64.b64encode(content).decode()
    return dict(
        kind='storage#object', id=f'{NAME}/{name}/{self.generation}', bucket=NAME, name=name,
        size=str(len(self.content)), generation=str(self.generation), metageneration='1',
        etag=str(self.generation), timeCreated=stamp, updated=stamp, storageClass='STANDARD',
        contentType='application/octet-stream', md5Hash=digest(hashlib.md5(self.content).digest()),
        # Of another polynomial than the real one's; clients here compare it with itself only.
        crc32c=digest(zlib.crc32(self.content).to_bytes(4, 'big')))


class Bucket:
  """Its objects by name, and what was asked of it.

  Attributes:
    objects: name -> Object.
    log: (seconds, method, name or prefix) of every request.
    latency: seconds that each request takes.
    refuse: (method, name) -> whether to answer with status 403; for tests.
  """

  def __init__(self, latency: float = 0.0):
    self.objects: dict[str, Object] = {}
    self.log: list[tuple[float, str, str]] = []
    self.latency = latency
    self.refuse = lambda method, name: False
    self.lock = threading.Lock()
    self.uploads: dict[str, tuple[str, bytes, dict]] = {}
    self.generations = itertools.count(1)

  def put(self, name: str, content: bytes, wanted: str | None = None) -> Object | None:
    """Writes an object, if its generation is the one `wanted`; None if it isn't."""
    with self.lock:
      there = self.objects.get(name)
      if wanted is not None and int(wanted) != (there.generation if there else 0):
        return None
      self.objects[name] = Object(content, next(self.generations), time.time())
      return self.objects[name]

  def below(self, prefix: str) -> dict[str, bytes]:
    """Contents by the rest of the name."""
    with self.lock:
      return {name[len(prefix):]: found.content for name, found in self.objects.items()
              if name.startswith(prefix)}


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  wbufsize = -1

  def log_message(self, *_):
    pass

  def _answer(self, status, content=b'', **headers):
    if isinstance(content, dict):
      content = json.dumps(content).encode()
      headers.setdefault('Content_Type', 'application/json')
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), str(value))
    if status != 304:
      self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)
    self.wfile.flush()

  def _error(self, status, message):
    self._answer(status, dict(error=dict(code=status, message=message, errors=[])))

  def _serve(self):
    bucket = self.server.bucket
    url = urllib.parse.urlsplit(self.path)
    self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    body = self._body()
    parts = [urllib.parse.unquote(part) for part in re.sub(
        r'^/(upload/|download/)?storage/v1/b/', '', url.path).split('/')]
    name = '/'.join(parts[2:])
    if bucket.latency:
      time.sleep(bucket.latency)
    with bucket.lock:
      bucket.log.append((time.monotonic(), self.command, name or self.query.get(
          'name') or self.query.get('prefix', '')))
    if parts[0] != NAME:
      return self._error(404, f'The specified bucket does not exist: {parts[0]}')
    if bucket.refuse(self.command, name or self.query.get('name', '')):
      return self._error(403, 'The caller does not have access')
    if len(parts) == 1:
      return self._answer(200, dict(kind='storage#bucket', name=NAME, id=NAME))
    if url.path.startswith('/upload/'):
      return self._upload(bucket, body)
    if not name:
      return self._list(bucket)
    if '/rewriteTo/b/' in name:
      return self._copy(bucket, *name.split(f'/rewriteTo/b/{NAME}/o/'))
    if '/moveTo/o/' in name:
      return self._copy(bucket, *name.split('/moveTo/o/'), remove=True)
    if self.command not in ('GET', 'DELETE'):
      return self._error(501, f'{self.command} {self.path} is not in this fake')
    return self._read(bucket, name) if self.command == 'GET' else self._delete(bucket, name)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

  def _body(self):
    if self.headers.get('Transfer-Encoding') == 'chunked':
      chunks = []
      while size := int(self.rfile.readline(), 16):
        chunks.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(chunks)
    return self.rfile.read(int(self.headers.get('Content-Length') or 0))

  def _list(self, bucket):
    prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter')
    start, limit = self.query.get('startOffset', ''), int(self.query.get('maxResults') or 1000)
    after = self.query.get('pageToken', '')
    items, prefixes = [], []
    with bucket.lock:
      found = sorted(bucket.objects.items())
    for name, held in found:
      if not name.startswith(prefix) or name < start or name <= after:
        continue
      if len(items) + len(prefixes) == limit:
        return self._answer(200, dict(kind='storage#objects', items=items, prefixes=prefixes,
                                      nextPageToken=last))
      rest = name[len(prefix):]
      if delimiter and delimiter in rest:
        folder = prefix + rest[:rest.index(delimiter) + 1]
        if folder not in prefixes:
          prefixes.append(folder)
      else:
        items.append(held.resource(name))
      last = name
    self._answer(200, dict(kind='storage#objects', items=items, prefixes=prefixes))

  def _read(self, bucket, name):
    with bucket.lock:
      held = bucket.objects.get(name)
    if held is None:
      return self._error(404, f'No such object: {NAME}/{name}')
    if self.query.get('alt') != 'media':
      return self._answer(200, held.resource(name))
    if self.query.get('ifGenerationNotMatch') == str(held.generation):
      return self._answer(304)
    about = {'x_goog_generation': held.generation, 'ETag': held.generation,
             'x_goog_stored_content_length': len(held.content)}
    asked = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not asked:
      return self._answer(200, held.content, **about)
    size = len(held.content)
    first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    last = min(size - 1, int(asked[2])) if asked[1] and asked[2] else size - 1
    if first >= size:
      return self._error(416, 'The requested range cannot be satisfied')
    self._answer(206, held.content[first:last + 1],
                 Content_Range=f'bytes {first}-{last}/{size}', **about)

  def _delete(self, bucket, name):
    wanted = self.query.get('ifGenerationMatch')
    with bucket.lock:
      there = bucket.objects.get(name)
      fits = there and wanted in (None, str(there.generation))
      if fits:
        del bucket.objects[name]
    if fits:
      return self._answer(204)
    self._error(412 if there else 404, f'No such object: {NAME}/{name}')

  def _copy(self, bucket, name, other, remove=False):
    with bucket.lock:
      held = bucket.objects.get(name)
    if held is None:
      return self._error(404, f'No such object: {NAME}/{name}')
    about = bucket.put(other, held.content).resource(other)
    if remove:
      with bucket.lock:
        del bucket.objects[name]
    self._answer(200, about if remove else dict(
        kind='storage#rewriteResponse', done=True, resource=about))

  def _upload(self, bucket, body):
    kind, identity = self.query.get('uploadType'), self.query.get('upload_id')
    if identity:
      return self._resume(bucket, identity, body)
    if kind == 'resumable':
      name = self.query.get('name') or json.loads(body)['name']
      identity = str(next(bucket.generations))
      bucket.uploads[identity] = name, b'', self.query
      host, port = self.server.server_address
      return self._answer(200, Location=f'http://{host}:{port}/upload/storage/v1/b/{NAME}/o'
                                        f'?uploadType=resumable&upload_id={identity}')
    name = self.query.get('name')
    if kind == 'multipart':
      name, body = self._parts(body)
    self._put(bucket, name, body, self.query)

  def _put(self, bucket, name, content, query):
    held = bucket.put(name, content, query.get('ifGenerationMatch'))
    if held is None:
      return self._error(412, 'At least one of the pre-conditions you specified did not hold.')
    self._answer(200, held.resource(name))

  def _resume(self, bucket, identity, body):
    name, content, query = bucket.uploads[identity]
    content += body
    bucket.uploads[identity] = name, content, query
    total = self.headers.get('Content-Range', '/*').rpartition('/')[2]
    if total == '*' or int(total) > len(content):
      return self._answer(308, Range=f'bytes=0-{len(content) - 1}')
    self._put(bucket, name, content, query)

  def _parts(self, body):
    boundary = re.search(r'boundary="?([^";]+)"?', self.headers['Content-Type'])[1].encode()
    _, about, content = body.split(b'--' + boundary, 2)
    bare = lambda part: re.split(rb'\r?\n\r?\n', part, maxsplit=1)[1]
    content = bare(content)
    content = content[:content.rindex(b'--' + boundary + b'--')]
    return json.loads(bare(about))['name'], re.sub(rb'\r?\n\Z', b'', content)


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request, client_address):
    if not isinstance(sys.exception(), ConnectionError):  # of a client that was killed
      super().handle_error(request, client_address)


def environment(port: int) -> dict[str, str]:
  """Where the clients find the bucket."""
  url = f'http://127.0.0.1:{port}'
  return dict(STORAGE_EMULATOR_HOST=url, TENSORSTORE_GCS_HTTP_URL=url,
              GOOGLE_CLOUD_PROJECT='fake', NO_GCE_CHECK='true')


@contextlib.contextmanager
def serve(latency: float = 0.0):
  """Yields a `Bucket` and its port while it is served."""
  with _Server(('127.0.0.1', 0), _Handler) as server:
    server.bucket = Bucket(latency)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05))
    thread.start()
    try:
      yield server.bucket, server.server_address[1]
    finally:
      server.shutdown()
      thread.join()


def request(port: int, name: str) -> bytes | None:
  """An object's content, for whoever must not hold a client; None if it isn't there."""
  url = f'http://127.0.0.1:{port}/storage/v1/b/{NAME}/o/{urllib.parse.quote(name, "")}?alt=media'
  try:
    with urllib.request.urlopen(url) as answer:
      return answer.read()
  except urllib.error.HTTPError as error:
    if error.code == 404:
      return None
    raise


def upload(port: int, name: str, content: bytes) -> None:
  """Puts an object, likewise."""
  urllib.request.urlopen(urllib.request.Request(
      f'http://127.0.0.1:{port}/upload/storage/v1/b/{NAME}/o?uploadType=media&name='
      f'{urllib.parse.quote(name, "")}', data=content, method='POST')).close()


if __name__ == '__main__':
  with serve(*map(float, sys.argv[1:])) as (_, served_at):
    print(served_at, flush=True)
    sys.stdin.read()  # until whoever started it is gone
