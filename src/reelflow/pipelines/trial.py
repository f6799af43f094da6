"""What the parts of a model work on: the code that will run is run on tensors without values (torch's FakeTensorMode), with one layer
per block, for layers take turns. Nothing is computed, and the most that lives at a time is counted.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reelflow.adapters.vae import Codec
from reelflow.config import FlowConfig
from reelflow.denoise import denoise, denoise_frames
from reelflow.flow import StarFlow, order, to_tokens
from reelflow.likelihood import log_prob
from reelflow.sampling import Schedule, Settings
from reelflow.sampling.conditioner import MASK_ROWS
from reelflow.sampling.deep import conditioner
from reelflow.sampling.inverse import Shallow
from reelflow.sampling.schedules import Solver, silent

CODEC = ("encode", "decode")
"""Stages that run on `meta` as it is, which is quicker: no kernel is chosen by the device."""


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

    @property
    def rows(self) -> int:
        """Of the deep block's batch: with guidance every clip has two."""
        return self.clips * (2 if self.guidance else 1)


class Trial:
    """Runs each stage of making a clip, or of reading one, once for a wish and a precision.

    Args:
        codec, text: the VAE's codec and the T5 encoder, on `meta`; text is None for a model without.
        device: the type of device that is meant, "cpu" or "cuda".
    """

    def __init__(self, config: FlowConfig, codec: Codec, text: Any | None, device: str):
        self.config, self.codec, self.text, self.device = config, codec, text, device
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.measured: dict[tuple[str, torch.dtype, Wish], tuple[int, Any]] = {}

    def work(self, stage: str, dtype: torch.dtype, wish: Wish) -> int:
        """Bytes besides the weights, and besides the deep block's cache, in "text", "encode", "read", "deep", "shallow", "denoise" or
        "decode".
        """
        return self._measure(stage, dtype, wish)[0]

    def cache(self, dtype: torch.dtype, wish: Wish) -> torch.Size:
        """Shape of the keys of the deep block's cache, of one layer."""
        return self._measure("deep", dtype, wish)[1]

    def window(self, wish: Wish) -> int:
        """Latent frames the deep block sees together."""
        return wish.window or self.config.window

    def _measure(self, stage: str, dtype: torch.dtype, wish: Wish) -> tuple[int, Any]:
        key = stage, dtype, wish
        if key not in self.measured:
            run: Callable[[Peak], Any] = getattr(self, f"_{stage}")(dtype, wish)
            with nullcontext() if stage in CODEC else self.fake, torch.no_grad(), Peak() as peak:
                found = run(peak)
            self.measured[key] = peak.most, found
        return self.measured[key]

    def _pass(self, peak: Peak, blocks: int, run: Callable[[], object]) -> None:
        """A pass of a block; a GPU records those of every block, each in memory of its own (see `sampling.replay`)."""
        most, held = peak.most, peak.live
        peak.most = held
        run()
        peak.most = max(most, peak.most + (blocks * (peak.most - held) if self.device == "cuda" else 0))

    def _flow(self, dtype: torch.dtype, layers: int | None = 1, denoiser: int | None = 1) -> StarFlow:
        """The flow without values, with so many layers in every block and in the denoiser; None: as many as it has."""
        config = self.config
        if layers:
            config = config.model_copy(update={"layers": (layers,) * len(config.layers)})
        if denoiser and config.denoiser:
            config = config.model_copy(update={"denoiser": config.denoiser.model_copy(update={"layers": denoiser})})
        with torch.device("meta"):
            return self._without_values(StarFlow(config).set_precision(dtype))

    def _without_values(self, module: Any) -> Any:
        """A `meta` module whose tensors say where they are, as those of a real one."""
        with self.fake:
            state = {name: torch.empty_like(x, device="cpu") for name, x in module.state_dict().items()}
            module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def _states(self, rows: int) -> Tensor | None:
        return torch.empty(rows, self.config.text_tokens, self.config.text_dim) if self.config.text_tokens else None

    def _noise(self, wish: Wish, frames: int) -> Tensor:
        return torch.empty(wish.clips, frames, self.config.channels, wish.height, wish.width)

    def _schedule(self, wish: Wish) -> Schedule:
        return Schedule(window=min(Schedule().tokens(torch.device(self.device)), wish.height * wish.width))

    def _text(self, dtype: torch.dtype, wish: Wish) -> Callable[[Peak], None]:
        assert self.text is not None
        config = deepcopy(self.text.config)
        config.num_layers = 1
        with torch.device("meta"):
            model = self._without_values(type(self.text)(config))

        def run(peak: Peak) -> None:
            ids = torch.ones(wish.rows, self.config.text_tokens, dtype=torch.long)
            model(input_ids=ids, attention_mask=ids)

        return run

    def _deep(self, dtype: torch.dtype, wish: Wish) -> Callable[[Peak], torch.Size]:
        """Gives the shape of its cache, which is left out."""
        flow, places = self._flow(dtype), wish.height * wish.width
        end, tokens = min(wish.frames, self.window(wish)) * places, min(MASK_ROWS, places)

        def run(peak: Peak) -> torch.Size:
            noise, settings = self._noise(wish, wish.frames), Settings(window=wish.window, ring=wish.ring)
            z = order(to_tokens(noise), flow.deep_block).flatten(1, 2)
            solver = Solver("deep block", flow.deep_block, z, places, self._schedule(wish), silent)
            reader = conditioner(flow, noise, float(wish.guidance), solver.window, settings)
            reader.read_text(self._states(wish.rows))
            self._pass(peak, 1, partial(reader, solver.stream[:, :tokens], torch.arange(end - tokens, end)[None], end))
            peak.most -= reader.cache.keys.nbytes + reader.cache.values.nbytes
            return reader.cache.keys.shape

        return run

    def _shallow(self, dtype: torch.dtype, wish: Wish) -> Callable[[Peak], None]:
        most = max(self.config.layers[:-1], default=1)
        flow, places = self._flow(dtype, most), wish.height * wish.width  # caches of all blocks are held, each of all its layers

        whole, left, window = wish.frames if wish.certify else wish.given, wish.frames - wish.given, self.window(wish)
        parts = [1] if wish.stream else [part for part in (min(left, window), left % window if left > window else 0) if part]

        def run(peak: Peak) -> None:
            if whole:
                flow.to_deep(self._noise(wish, whole))
            made = [Shallow(flow, wish.clips * part, (wish.height, wish.width), self._schedule(wish), silent) for part in parts]
            for solver, reader in made[0].steps[:1]:
                inputs, place = solver.stream[:, : solver.window], torch.arange(solver.window)[None]
                self._pass(peak, len(made) * len(made[0].steps), partial(reader, inputs, place, places))

        return run

    def _denoise(self, dtype: torch.dtype, wish: Wish) -> Callable[[Peak], None]:
        whole = None if wish.stream or self.config.denoiser is None else 1
        flow = self._flow(dtype, 1 if self.config.denoiser else None, whole)
        frames = min(wish.frames, self.window(wish))

        def run(peak: Peak) -> None:
            text = self._states(wish.clips)
            if wish.stream:
                coming = (self._noise(wish, 1)[:, 0] for _ in range(frames))
                deque(denoise_frames(flow, coming, lambda frame: text), maxlen=0)
            else:
                denoise(flow, self._noise(wish, frames), text, wish.window)

        return run

    def _read(self, dtype: torch.dtype, wish: Wish) -> Callable[[Peak], None]:
        flow, frames = self._flow(dtype), min(wish.frames, self.config.window)

        def run(peak: Peak) -> None:
            log_prob(flow, self._noise(wish, frames), self._states(wish.clips))

        return run

    def _decode(self, dtype: torch.dtype, wish: Wish) -> Callable[[Peak], None]:
        codec, frames = self._codec(dtype), min(wish.frames, 3)  # from the second frame on its own cache is full
        shape = (wish.clips, frames, codec.channels, wish.height, wish.width)

        def run(peak: Peak) -> None:
            deque(codec.decode_pixels(torch.empty(shape, device="meta").unbind(1)), maxlen=0)

        return run

    def _encode(self, dtype: torch.dtype, wish: Wish) -> Callable[[Peak], None]:
        codec, unit = self._codec(dtype), self.codec.spatial_factor
        frames = 1 + self.codec.temporal_factor * (min(wish.given or wish.frames, 3) - 1)
        shape = (1, frames, wish.height * unit, wish.width * unit, 3)

        def run(peak: Peak) -> None:
            codec.encode(torch.empty(shape, dtype=torch.uint8, device="meta"))

        return run

    def _codec(self, dtype: torch.dtype) -> Codec:
        codec = copy(self.codec)
        codec.vae = nn.Module.to(deepcopy(codec.vae), dtype)  # past the library's own, which has something to say
        return codec


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


__all__ = ["Peak", "Trial", "Wish"]
