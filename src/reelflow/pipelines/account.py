"""What a clip needs of memory, counted before anything is loaded.

Weights and caches are counted from the configuration. What the networks work on is measured: the code that will run is run on
tensors without values (the `meta` device, as itself or under the name of another in torch's FakeTensorMode), on a model of one
layer per block, for layers take turns. Not counted: what an allocator loses between tensors, and the workspaces of libraries;
`RESERVE` is for both.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reelflow.adapters.precision import compute_dtype, quantised, weight_bytes
from reelflow.adapters.vae import Codec
from reelflow.config import FlowConfig
from reelflow.denoise import denoise, denoise_frames
from reelflow.flow import KVCache, StarFlow, order, to_tokens
from reelflow.flow.attention import Layer
from reelflow.likelihood import log_prob
from reelflow.sampling import Schedule, Settings
from reelflow.sampling.conditioner import MASK_ROWS
from reelflow.sampling.deep import conditioner
from reelflow.sampling.inverse import Shallow
from reelflow.sampling.schedules import Solver, silent

RESERVE = {"cpu": 700_000_000, "cuda": 800_000_000}
"""Bytes: a process on a CPU before it loads a model; a GPU's context and its libraries' workspaces (assumed, not measured)."""


@dataclass(frozen=True)
class Wish:
    """A clip to make.

    frames, height, width: of the latents, given frames included.  clips: of the batch.  given: latent frames it begins with.
    window: latent frames the deep block sees together; None: the trained ones.  stream, ring, denoise, certify: as in `Sampling`.
    read: it is not made but read (scored, encoded).
    """

    frames: int
    height: int
    width: int
    guidance: bool
    clips: int = 1
    given: int = 0
    window: int | None = None
    stream: bool = False
    ring: bool = False
    denoise: bool = True
    certify: bool = False
    read: bool = False


@dataclass(frozen=True)
class Way:
    """A way of running a model.

    precision: of the flow's layers.  layers: the deep block's are on the "device", or in the "host"'s memory until they are needed.
    cache: the deep block's is "whole", in "bytes", or in the "host"'s memory.  turns: parts are on the device only while they are used.
    codec: its precision.
    """

    precision: str
    layers: str = "device"
    cache: str = "whole"
    turns: bool = False
    codec: str = "float32"


class Account:
    """Bytes of a model's parts.

    Args:
        codec, text: the VAE's codec and the T5 encoder, on `meta`; text is None for a model without.
        device: the type of device, "cpu" or "cuda".
    """

    def __init__(self, config: FlowConfig, codec: Codec, text: Any | None, device: str):
        self.config, self.codec, self.text, self.device = config, codec, text, device
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.measured: dict[tuple[Any, ...], int] = {}

    def clip(self, wish: Wish) -> str:
        """A clip in words."""
        frames, unit = 1 + (wish.frames - 1) * self.codec.temporal_factor, self.codec.spatial_factor
        several = f"{wish.clips} clips of " if wish.clips > 1 else ""
        return f"{several}{frames} frames of {wish.width * unit} × {wish.height * unit}{' with guidance' if wish.guidance else ''}"

    def need(self, way: Way, wish: Wish) -> int:
        """The most that is on the device at any time."""
        return max(self.stages(way, wish).values())

    def stages(self, way: Way, wish: Wish) -> dict[str, int]:
        """What is on the device in each stage: the reserve, the weights that are there then, caches, and what is worked on."""
        held = self.weights(way)
        always = RESERVE.get(self.device, RESERVE["cuda"]) + (0 if way.turns else sum(held.values()))
        rows = self._rows(way, wish)
        return {name: always + work + (sum(held[part] for part in parts) if way.turns else 0) for name, parts, work in rows}

    def _rows(self, way: Way, wish: Wish) -> Iterator[tuple[str, tuple[str, ...], int]]:
        """(stage, the parts it uses, bytes besides their weights)."""
        dtype, codec = compute_dtype(way.precision), getattr(torch, way.codec)
        if self.text is not None:
            yield "text", ("text",), self.work(self._text, dtype, wish)
        if wish.given or wish.read:
            yield "encode", ("codec",), self.work(self._encode, codec, wish)
        if wish.read:
            yield "read", ("flow",), self.work(self._read, dtype, wish)
            return
        deep = self.cache_bytes(way, wish)[0] + self.work(self._deep, dtype, wish)
        shallow = self.work(self._shallow, dtype, wish)
        score = self.work(self._denoise, dtype, wish) if wish.denoise else 0
        pixels = self.work(self._decode, codec, wish)
        if wish.stream:
            yield "stream", ("flow", "denoiser", "codec"), deep + shallow + score + pixels
            return
        yield "sample", ("flow",), max(deep, shallow)
        if wish.denoise:
            yield "denoise", ("denoiser" if self.config.denoiser else "flow",), score
        yield "decode", ("codec",), pixels

    def weights(self, way: Way) -> dict[str, int]:
        """Bytes of each part's weights on the device while it is used: flow, denoiser, codec, text."""
        sizes = self._sizes(way)
        streamed = [size for name, size in sizes.items() if self._far(way, name)]
        flow = sum(size for name, size in sizes.items() if not name.startswith("denoiser.")) - sum(streamed)
        return {
            "flow": flow + 2 * max(streamed, default=0),  # one at work, the next on its way
            "denoiser": sum(size for name, size in sizes.items() if name.startswith("denoiser.")),
            "codec": sum(p.numel() for p in self.codec.vae.parameters()) * getattr(torch, way.codec).itemsize,
            "text": sum(p.nbytes for p in self.text.parameters()) if self.text is not None else 0,
        }

    def host(self, way: Way, wish: Wish) -> int:
        """What the host's memory has to hold of a model on another device."""
        away = sum(size for name, size in self._sizes(way).items() if self._far(way, name))
        return away + self.cache_bytes(way, wish)[1] + (sum(self.weights(way).values()) if way.turns else 0)

    def moved(self, way: Way, wish: Wish) -> int:
        """What comes from the host's memory in a pass at the end of the clip, at most."""
        return sum(size for name, size in self._sizes(way).items() if self._far(way, name)) + self.cache_bytes(way, wish)[1]

    def _sizes(self, way: Way) -> dict[str, int]:
        """Bytes of the flow's tensors."""
        found = {}
        for name, p in _meta(self.config, compute_dtype(way.precision)).named_parameters():
            module, _, kind = name.rpartition(".")
            matrix = kind == "weight" and p.ndim == 2 and quantised(module)
            found[name] = weight_bytes(way.precision, p.shape[0], p.shape[1], self.device) if matrix else p.nbytes
        return found

    @staticmethod
    def _far(way: Way, name: str) -> bool:
        return way.layers == "host" and name.startswith("deep_block.layers.")

    def cache_bytes(self, way: Way, wish: Wish) -> tuple[int, int]:
        """The deep block's keys and values: bytes on the device, what is worked on included, and in the host's memory."""
        layers, attention = self.config.layers[-1], cast(Layer, _meta(self.config, torch.float32).deep_block.layers[0]).attention
        frames, places = min(wish.frames, wish.window or self.config.window), wish.height * wish.width
        slots = self.config.text_tokens + (1 + ((wish.window or self.config.window) + 1) * places if wish.ring else frames * places)
        slots += 0 if wish.ring else self._window(places)
        heads = wish.clips * (2 if wish.guidance else 1) * slots * attention.kv_heads * 2
        dims, unit = attention.head_dim, compute_dtype(way.precision).itemsize
        twice = 2 if wish.stream and not wish.ring and wish.frames > frames else 1  # the next window is read meanwhile
        device = {"whole": layers * dims * unit, "bytes": layers * (dims + unit) + dims * unit, "host": 2 * dims * unit}[way.cache]
        return twice * heads * device, twice * heads * layers * dims * unit if way.cache == "host" else 0

    def _window(self, places: int) -> int:
        return min(Schedule().tokens(torch.device(self.device)), places, MASK_ROWS)

    def work(self, what: Callable[[torch.dtype, Wish], Callable[[], object]], dtype: torch.dtype, wish: Wish) -> int:
        """The most bytes that live while the function runs that `what` gives; caches of the deep block left out."""
        key = (what.__name__, dtype, wish)
        if key not in self.measured:
            run = what(dtype, wish)
            with self.mode if what not in (self._decode, self._encode) else nullcontext(), torch.no_grad(), Peak() as peak:
                kept = run()
                own = sum(cache.keys.nbytes + cache.values.nbytes for cache in tree_leaves(kept) if isinstance(cache, KVCache))
            self.measured[key] = peak.most - own
        return self.measured[key]

    def _flow(self, dtype: torch.dtype, layers: int | None = 1, denoiser: int | None = 1) -> StarFlow:
        """The flow without values, with so many layers in every block and in the denoiser; None: as many as it has."""
        config = self.config
        if layers:
            config = config.model_copy(update={"layers": (layers,) * len(config.layers)})
        if denoiser and config.denoiser:
            config = config.model_copy(update={"denoiser": config.denoiser.model_copy(update={"layers": denoiser})})
        return self._without_values(deepcopy(_meta(config, dtype)))

    def _without_values(self, module: Any) -> Any:
        """A `meta` module with tensors that say where they are and how large, and no more."""
        with self.mode:
            state = {name: torch.empty(p.shape, dtype=p.dtype, device="cpu") for name, p in module.state_dict().items()}
            module.load_state_dict(state, assign=True)
        return cast(nn.Module, module).eval().requires_grad_(False)

    def _states(self, wish: Wish, rows: int) -> Tensor | None:
        return torch.empty(rows, self.config.text_tokens, self.config.text_dim) if self.config.text_tokens else None

    def _noise(self, wish: Wish, frames: int) -> Tensor:
        return torch.empty(wish.clips, frames, self.config.channels, wish.height, wish.width)

    def _text(self, dtype: torch.dtype, wish: Wish) -> Callable[[], object]:
        assert self.text is not None
        config = deepcopy(self.text.config)
        config.num_layers = 1
        with torch.device("meta"):
            model = self._without_values(type(self.text)(config))

        def run() -> None:
            ids = torch.ones(wish.clips * (2 if wish.guidance else 1), self.config.text_tokens, dtype=torch.long)
            model(input_ids=ids, attention_mask=ids)

        return run

    def _deep(self, dtype: torch.dtype, wish: Wish) -> Callable[[], object]:
        flow, places = self._flow(dtype), wish.height * wish.width
        end = min(wish.frames, wish.window or self.config.window) * places
        tokens, rows = min(MASK_ROWS, places), wish.clips * (2 if wish.guidance else 1)

        def run() -> object:
            noise, settings = self._noise(wish, wish.frames), Settings(window=wish.window, ring=wish.ring)
            z = order(to_tokens(noise), flow.deep_block).flatten(1, 2)
            solver = Solver("deep block", flow.deep_block, z, places, Schedule(window=self._window(places)), silent)
            reader = conditioner(flow, noise, float(wish.guidance), solver.window, settings)
            reader.read_text(self._states(wish, rows))
            reader(solver.stream[:, :tokens], torch.arange(end - tokens, end)[None], end)
            return reader.cache

        return run

    def _shallow(self, dtype: torch.dtype, wish: Wish) -> Callable[[], object]:
        most = max(self.config.layers[:-1], default=1)
        flow, places = self._flow(dtype, most), wish.height * wish.width  # caches of all blocks are held, each of all its layers
        whole = wish.frames if wish.certify else wish.given

        def run() -> None:
            if whole:
                flow.to_deep(self._noise(wish, whole))
            frames = wish.clips * (1 if wish.stream else min(wish.frames, wish.window or self.config.window))
            blocks = Shallow(flow, frames, (wish.height, wish.width), Schedule(window=self._window(places)), silent)
            for solver, reader in blocks.steps[:1]:
                reader(solver.stream[:, : solver.window], torch.arange(solver.window)[None], places)

        return run

    def _denoise(self, dtype: torch.dtype, wish: Wish) -> Callable[[], object]:
        whole = None if wish.stream or self.config.denoiser is None else 1
        flow = self._flow(dtype, 1 if self.config.denoiser else None, whole)
        frames = min(wish.frames, wish.window or self.config.window)

        def run() -> None:
            text = self._states(wish, wish.clips)
            if wish.stream:
                coming = (self._noise(wish, 1)[:, 0] for _ in range(frames))
                deque(denoise_frames(flow, coming, lambda frame: text), maxlen=0)
            else:
                denoise(flow, self._noise(wish, frames), text, wish.window)

        return run

    def _read(self, dtype: torch.dtype, wish: Wish) -> Callable[[], object]:
        flow, frames = self._flow(dtype), min(wish.frames, self.config.window)
        return lambda: log_prob(flow, self._noise(wish, frames), self._states(wish, wish.clips))

    def _decode(self, dtype: torch.dtype, wish: Wish) -> Callable[[], object]:
        codec, frames = self._codec(dtype), min(wish.frames, 3)  # from the second frame on its own cache is full
        shape = (wish.clips, frames, self.codec.channels, wish.height, wish.width)
        return lambda: deque(codec.decode_pixels(torch.empty(shape, device="meta").unbind(1)), maxlen=0)

    def _encode(self, dtype: torch.dtype, wish: Wish) -> Callable[[], object]:
        codec, unit = self._codec(dtype), self.codec.spatial_factor
        frames = 1 + self.codec.temporal_factor * (min(wish.given or wish.frames, 3) - 1)
        shape = (wish.clips, frames, wish.height * unit, wish.width * unit, 3)
        return lambda: codec.encode(torch.empty(shape, dtype=torch.uint8, device="meta"))

    def _codec(self, dtype: torch.dtype) -> Codec:
        codec = copy(self.codec)
        codec.vae = nn.Module.to(deepcopy(self.codec.vae), dtype)  # past the library's own, which has something to say
        return codec


@lru_cache(maxsize=8)
def _meta(config: FlowConfig, dtype: torch.dtype) -> StarFlow:
    with torch.device("meta"):
        return StarFlow(config).set_precision(dtype).requires_grad_(False)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside it hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.held: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in [x.untyped_storage() for x in tree_leaves(found) if isinstance(x, Tensor)]:
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self.held:
                self.held.add(key)
                self.live += size
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self._free, key, size)
        return found

    def _free(self, key: int, size: int) -> None:
        self.held.discard(key)
        self.live -= size


__all__ = ["Account", "Way", "Wish"]
