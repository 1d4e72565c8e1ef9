"""A tiny server without an event loop: modules that come and go between two arenas, batches through the lanes."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from runtime.clock import MonotonicClock
from runtime.forwards import Forwards
from runtime.launch import Launch
from runtime.lower_stores import LowerStores
from runtime.sequence_store import SequenceStore
from runtime.threads import ThreadChoice
from runtime.uploads import Uploads, module_pieces
from tests.lanes.fake_device import FakeDevice, Telling
from vbert.arena import Arena
from vbert.checkpoint import write_tenant
from vbert.header import parse_header
from vbert.model import Model, SequenceInput
from vbert.rows import MappedRows

FLOAT, CPU = torch.float32, torch.device("cpu")
LANES = ("rows", "modules", "compute")


class Modules:
    """Native files of some tenants, and the answers of the plain forward with all of them in memory."""

    def __init__(self, backbone, factory, folder):
        self.backbone, self.files, self.model = backbone, {}, Model(backbone, FLOAT, CPU)
        arena = Arena(backbone.config, backbone.fingerprint, FLOAT, 2**20)
        self.resident = []
        for module in (factory.tenant(kind) for kind in ("lora", "houlsby", "mask", "lora", "bitfit")):
            data = write_tenant(module)
            digest = hashlib.sha256(data).hexdigest()
            path = folder / digest
            path.write_bytes(data)
            self.files[digest] = (parse_header(data), path)
            self.resident.append(arena.fill(arena.reserve(self.files[digest][0], digest), path))

    def sequences(self, tenants, *, resident=None, length=5):
        """Two of each tenant, by number; None: the bare backbone."""
        resident = self.resident if resident is None else resident
        return [
            SequenceInput(
                [5 + n + i for n in range(length + i)],
                [0] * (length + i),
                None if t is None else resident[t],
                scope=b"",  # where there is a store, the bare backbone's sequences are kept and found
            )
            for t in tenants
            for i in range(2)
        ]

    def store(self, device):
        """Of the states that enter the layer in the middle."""
        config = self.backbone.config
        layer, width = config.num_layers // 2, config.hidden_size
        fingerprint = self.backbone.fingerprint
        store = SequenceStore(layer=layer, width=width, dtype=FLOAT, fingerprint=fingerprint, num_bytes=2**20)
        return ToldStores(sequences=store, device=device)

    def answers(self, tenants, length=5):
        return self.model.forward(self.model.pack(self.sequences(tenants, length=length)))


class ToldSource:
    """A row source that says what it writes. fail: gathers, by number, that raise."""

    def __init__(self, source, device, fail=()):
        self.source, self.device, self.fail, self.calls = source, device, set(fail), 0
        self.width, self.dtype = source.width, source.dtype

    def gather(self, rows, out):
        self.calls += 1
        if self.calls - 1 in self.fail:
            raise OSError("the table went away")
        if isinstance(self.device, FakeDevice):
            self.device.touch(writes=[out])
        self.source.gather(rows, out)


@dataclass(frozen=True)
class ToldStores(LowerStores):
    """Stores that say what they write and read, as if in pinned memory."""

    device: object = None

    def routes(self, sequences, *, pin):
        routes = super().routes(sequences, pin=False)
        if pin and routes.found is not None:
            self.device.touch(writes=[self.device.keep(routes.found.rows)])
        return routes

    def remember(self, routes, sequences, states, ngrams):
        if states is not None and isinstance(self.device, FakeDevice):
            self.device.touch(reads=[states])
        super().remember(routes, sequences, states, ngrams)


class LazyModel(Model):
    """The model on a fake device: issues a forward and returns. fail: launches, by number, that raise half way."""

    def __init__(self, backbone, device, pieces, fail=()):
        super().__init__(backbone, FLOAT, CPU)
        self.fake, self.pieces, self.fail, self.launches = device, pieces, set(fail), 0

    def launch(self, batch, feed=None):
        self.launches += 1
        if not isinstance(self.fake, FakeDevice):
            self._maybe_fail()
            return super().launch(batch, feed)
        stream, rows, answers = self.fake.compute, _Rows(), []
        for i in range(-1, self.config.num_layers + 1):
            feed.before_layer(i)
            reads = [dst for t in batch.tenants for layer, dst, _ in self.pieces.get(t.digest, ()) if layer == i]
            if i == -1 and (words := feed.word_rows()) is not None:
                rows.words = words
                reads.append(words)
            if (junction := batch.junction) is not None and i == junction.layer:
                if len(junction.kept):
                    rows.kept = self.fake.keep(torch.empty(len(junction.kept), self.config.hidden_size))
                    stream.issue(lambda: None, writes=[rows.kept])
                    feed.keep(rows.kept)
                if junction.num_given:
                    rows.given = feed.given_rows()
                    reads.append(rows.given)
            stream.issue(lambda: None, reads=reads)
            if i == 0:
                self._maybe_fail()
        plain = super().launch
        stream.issue(lambda: answers.extend(plain(batch, rows)()))
        event = stream.record()

        def finish():
            event.synchronize()
            return answers

        return finish

    def _maybe_fail(self):
        if self.launches - 1 in self.fail:
            raise RuntimeError("CUDA error: out of memory")


@dataclass
class _Rows:
    """The feed of what runs later: all that it takes was asked for when it was issued."""

    words: torch.Tensor | None = None
    given: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def word_rows(self):
        return self.words

    def given_rows(self):
        return self.given

    def keep(self, rows):
        self.kept.copy_(rows)

    def before_layer(self, i):
        pass


class Server:
    """Room for three modules on the device, and for one on its way in host memory."""

    def __init__(self, modules, device, *, lanes=LANES, words=None, stored=False, fail_gathers=(), fail_launches=()):
        self.modules, self.device, self.lanes = modules, device, lanes
        config = modules.backbone.config, modules.backbone.fingerprint, FLOAT
        self._host, self._dev = Arena(*config, 2**20), Arena(*config, 2**20)
        self._sending, self.num_failed_uploads = None, 0
        self.resident, self._order, self._pieces, self._arrivals = {}, deque(), {}, {}
        self._uploads = Uploads(device, overlapped="modules" in lanes)
        self._stack = ExitStack()
        model = LazyModel(modules.backbone, device, self._pieces, fail_launches)
        self.source = None if words is None else ToldSource(words, device, fail_gathers)
        self._stores = modules.store(device) if stored else LowerStores()
        fake = isinstance(device, FakeDevice)
        compute, rows, results = (
            self._stack.enter_context(Telling(device) if fake else ThreadPoolExecutor(1)) for _ in range(3)
        )
        self.forwards = Forwards(
            model,
            device,
            compute,
            clock=MonotonicClock(),
            threads=ThreadChoice((1,)),
            rows=rows if "rows" in lanes else None,
            results=results,
            overlapped="compute" in lanes,
            source=self.source,
            stores=self._stores,
            arriving=lambda tenant: self._arrivals.get(tenant.digest),
        )
        self._in_flight = deque()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()
        self.device.close()

    @property
    def num_hits(self):
        return 0 if self._stores.sequences is None else self._stores.sequences.counts.hits

    def run(self, batches, *, lengths=(5, 9, 5), depth=3):
        """Outcomes of every batch, up to `depth` of them in flight; three are more than there are staging buffers."""
        outcomes = []
        for k, tenants in enumerate(batches):
            while len(self._in_flight) >= depth:
                outcomes.append(self._next())
            for t in tenants:
                self._bring(t, {*tenants}, outcomes)
            sequences = self.modules.sequences(tenants, resident=self.resident, length=lengths[k % len(lengths)])
            self._in_flight.append((tenants, self.forwards.submit(Launch(k, sequences))))
        while self._in_flight:
            outcomes.append(self._next())
        return outcomes

    def _next(self):
        outcomes = self._in_flight[0][1].result(20).outcomes
        self._in_flight.popleft()
        if isinstance(self.device, FakeDevice):
            self.device.meet()  # what a future tells
        return outcomes

    def _bring(self, t, wanted, outcomes):
        if t is None or t in self.resident:
            return
        if len(self._order) == 3:
            victim = next(v for v in self._order if v not in wanted)
            while any(victim in tenants for tenants, _ in self._in_flight):
                outcomes.append(self._next())
            self._order.remove(victim)
            gone = self.resident.pop(victim)
            self._arrivals.pop(gone.digest).synchronize()
            self._dev.release(gone)
        self.resident[t] = self._upload(*list(self.modules.files.items())[t])
        self._order.append(t)

    def _upload(self, digest, file):
        header, path = file
        if self._sending is not None:
            before, arrival = self._sending
            if "modules" in self.lanes:  # else `start` waited already
                arrival.synchronize()
            self._host.release(before)
        reserved = self._host.reserve(header, digest)
        target = self._dev.reserve(header, digest)
        resident = self._host.fill(reserved, path)
        pieces = module_pieces(resident, target)
        arrival = self._start(pieces, digest)
        self._pieces[digest], self._arrivals[digest] = pieces, arrival
        self._sending = reserved, arrival
        return replace(resident, reservation=target)

    def _start(self, pieces, digest):
        """An upload that fails is tried again, after both its ends were used for something else."""
        for _ in range(10):
            if isinstance(self.device, FakeDevice):
                self.device.touch(writes=[memory for _, *ends in pieces for memory in ends])
            try:
                return self._uploads.start(pieces, digest)
            except RuntimeError:
                self.num_failed_uploads += 1
        raise AssertionError("too many faults")


def mapped(backbone, path):
    """The word embeddings of a backbone in a mapped file."""
    from vbert.rows import publish_rows

    publish_rows(path, backbone.weights["word_embeddings"], backbone.fingerprint)
    return MappedRows(path, backbone.fingerprint)
