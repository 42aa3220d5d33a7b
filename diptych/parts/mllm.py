"""A vision-language model of transformers (InternVL3, Qwen2.5-VL) with the interface of ``parts.decoder``.

The language model runs over packed tokens and calls ``attend(layer, q, k, v)`` in place of its own attention.
``parts.attention`` therefore handles documents, caches and hidden segments, and this module needs no padding or masks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange, repeat
from torch import nn

from diptych.core.batch import Batch, Pictures
from diptych.core.layout import Kind, Segment
from diptych.core.sample import Speaker
from diptych.core.tensors import NONE, Float, Int, Tensor, to_float
from diptych.machine.extras import install
from diptych.parts.attention import Attend, Cache
from diptych.parts.batch_invariant import linear
from diptych.parts.images import AreaRule, SizeRule
from diptych.parts.pretrained import pretrained, reading

KIND = "a vision-language model"
ATTENTION = "diptych"  # the name under which transformers finds ``_attention``


@dataclass(frozen=True)
class Template:
    """The chat template; special tokens in these strings become single tokens (the defaults are Qwen's)."""

    system: str = "<|im_start|>system\n"
    user: str = "<|im_start|>user\n"
    assistant: str = "<|im_start|>assistant\n"
    end: str = "<|im_end|>\n"
    stop: str = "<|im_end|>"  # the token that ends an answer
    image: tuple[str, str] = ("<img>", "</img>")  # the text before and after a picture's tokens

    def opening(self, speaker: Speaker) -> str:
        """The text that begins a message of ``speaker``."""
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[speaker]


@dataclass(frozen=True)
class MllmConfig:
    """``model`` is the ``config.json`` of transformers; ``see`` chooses the size of a picture where the vision tower
    takes several sizes (Qwen2.5-VL)."""

    model: dict[str, Any]
    template: Template = Template()
    see: SizeRule | AreaRule = SizeRule(longest=1008, shortest=56, stride=28)

    def __post_init__(self) -> None:
        if self.model.get("model_type") not in TOWERS:
            raise ValueError(
                f"unknown model_type {self.model.get('model_type')!r} of a vision-language model; "
                f"choose from {', '.join(TOWERS)}"
            )

    @property
    def width(self) -> int:
        """D of the language model."""
        return int((self.model.get("text_config") or self.model)["hidden_size"])

    @property
    def longest(self) -> int:
        """The greatest side, in pixels, at which the vision tower takes a picture."""
        sides = self.model.get("vision_config", {}).get("image_size")
        if sides is not None and self.model["model_type"] == "internvl":
            return max(sides)
        return self.see.longest if isinstance(self.see, SizeRule) else round(self.see.most**0.5)

    @staticmethod
    def of(source: str | Path, see: SizeRule | AreaRule | None = None) -> MllmConfig:
        """The config of a folder of transformers, or of an ``org/name`` of the hub. Raises ``ValueError``."""
        auto = _transformers()
        with reading(source, KIND):
            row = auto.AutoConfig.from_pretrained(str(source)).to_dict()
        if row["model_type"] not in TOWERS:
            raise ValueError(f"{source} is a {row['model_type']}; choose from {', '.join(TOWERS)}")
        template = Template(image=TOWERS[row["model_type"]].image)
        return MllmConfig(row, template, see or MllmConfig.see)


@runtime_checkable
class LanguageOutput(Protocol):
    """The output of a decoder of transformers."""

    @property
    def last_hidden_state(self) -> Tensor:
        """Final normed states, (1, T, D)."""


@runtime_checkable
class Language(Protocol):
    """A decoder of transformers, as far as it is used here."""

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The embedding table."""

    def __call__(
        self,
        *,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Mapping[str, None],
        use_cache: bool,
        attend: Attend,
    ) -> LanguageOutput:
        """The final states of embedded tokens (1, T, D); every layer calls ``attend``."""


@runtime_checkable
class ImageFeatures(Protocol):
    """The output of a vision tower of transformers: one tensor, or one tensor a picture."""

    @property
    def pooler_output(self) -> Tensor | Sequence[Tensor]:
        """Tokens in the space of the text embeddings."""


@runtime_checkable
class SeesImages(Protocol):
    """A vision-language model of transformers, as far as its vision tower is used here."""

    def get_image_features(
        self, *, pixel_values: Tensor, image_grid_thw: Tensor | None = None, return_dict: bool
    ) -> ImageFeatures:
        """The tokens of preprocessed pictures."""


class Mllm(nn.Module):
    """The network of a config, with uninitialised weights; ``load_pretrained`` copies published ones.

    ``width`` is D of the embeddings; ``layers``, ``heads`` and ``head_width`` are the sizes of the key/value cache."""

    def __init__(self, config: MllmConfig) -> None:
        super().__init__()
        auto = _transformers()
        row = {k: v for k, v in config.model.items() if k not in ("model_type", "architectures")}
        architecture = auto.AutoConfig.for_model(config.model["model_type"], **deepcopy(row))
        text = architecture.text_config
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise ValueError("a vision-language model with sliding-window layers is not supported")
        architecture._attn_implementation = {"text_config": ATTENTION, "vision_config": "sdpa"}
        self.model = auto.AutoModel.from_config(architecture, dtype=torch.get_default_dtype())
        self.tower: Tower = TOWERS[architecture.model_type](architecture, config.see)
        tied = getattr(architecture, "tie_word_embeddings", None)
        tied = text.tie_word_embeddings if tied is None else tied
        self.lm_head = None if tied else nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.width, self.layers, self.heads = text.hidden_size, text.num_hidden_layers, text.num_key_value_heads
        self.head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.vocab_size = text.vocab_size
        with torch.device("cpu"):  # tables that no checkpoint holds exist on the meta device too
            for module in list(self.model.modules()):
                for name, child in list(module.named_children()):
                    if "inv_freq" in child._buffers:
                        setattr(module, name, type(child)(child.config))

    @property
    def language(self) -> Language:
        """The decoder of transformers."""
        return self.model.language_model

    def blocks(self) -> Iterator[nn.Module]:
        """Decoder layers, then the vision tower's."""
        yield from self.language.layers
        yield from self.tower.blocks(self.model)

    def picture(self, size: tuple[int, int], **columns: Any) -> Segment:
        """The segment of a picture of (width, height), without its pixels: they are resized to ``size(size)``."""
        return self.tower.segment(size, **columns)

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) that a picture of this size is resized to."""
        return self.tower.size(size)

    def cache(self) -> Cache:
        """An empty cache for the language model's keys and values."""
        weight = self.language.embed_tokens.weight
        return Cache(self.layers, self.heads, self.head_width, weight.dtype, weight.device)

    def learns(self, batch: Batch) -> bool:
        """Whether the reader needs a backward pass: its weights or one of its pictures require a gradient."""
        pictures = (g.pixels for g in batch.of(Kind.VISION))
        return any(p.requires_grad for p in self.parameters()) or any(x.requires_grad for x in pictures)

    def embed(self, ids: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embeddings of text tokens."""
        return self.language.embed_tokens(ids)

    def look(self, images: Tensor) -> Float[Tensor, "N n D"]:
        """Tokens of pictures (N, 3, H, W), uint8 or float in [-1, 1], in the space of the text embeddings."""
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in self.tower.statistics)
        return self.tower.look(self.model, ((to_float(images) + 1) / 2 - mean) / std)

    def positions(self, positions: Int[Tensor, " T"], pictures: list[Pictures]) -> Tensor:
        """Position ids as the language model takes them: (T,), or (3, T) where a picture's rows and columns count."""
        return self.tower.positions(positions, pictures)

    def forward(self, x: Float[Tensor, "T D"], positions: Tensor, attend: Attend) -> Float[Tensor, "T D"]:
        """Final normed states of packed tokens."""
        masks = dict.fromkeys(("full_attention", "sliding_attention"))
        where = positions[None] if positions.dim() == 1 else positions[:, None]
        out = self.language(
            inputs_embeds=x[None], position_ids=where, attention_mask=masks, use_cache=False, attend=attend
        )
        return out.last_hidden_state[0]

    def logits(self, states: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Logits of the next token."""
        return linear(states, self.head_weight)

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """The weight of the language head; the embedding table where the two are tied."""
        return (self.lm_head or self.language.embed_tokens).weight

    def initialise(self, generator: torch.Generator) -> None:
        """Random weights of variance 1 / inputs; layers that write to the residual stream get 1 / (2 depth) of it."""
        depth = {"language_model": self.layers, "vision_tower": len(list(self.tower.blocks(self.model)))}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                std = module.weight[0].numel() ** -0.5
                if name.endswith(("o_proj", "down_proj", "projection_layer", "fc2", "attn.proj")):
                    std /= (2 * next((n for part, n in depth.items() if part in name), 1)) ** 0.5
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                std = self.width**-0.5 if self.lm_head is None else 0.3  # tied rows score words too
                nn.init.normal_(module.weight, std=std, generator=generator)
        for name, parameter in self.named_parameters():
            if name.endswith(("cls_token", "position_embeddings")):
                nn.init.normal_(parameter, std=0.1, generator=generator)

    @torch.no_grad()
    def load_pretrained(self, source: str | Path) -> None:
        """Copies the weights of a folder of transformers, or of an ``org/name`` of the hub.

        Raises ``ValueError`` where it cannot be read, and where its shapes or its settings differ."""
        with reading(source, KIND):
            theirs = _transformers().AutoConfig.from_pretrained(str(source))
        if errors := different(theirs.to_dict(), self.model.config.to_dict()):
            raise ValueError(f"{source} has other settings than the model: {'; '.join(errors)}")
        published = pretrained(_transformers().AutoModelForImageTextToText, source, KIND, dtype="auto")
        weights = published.state_dict()
        if self.lm_head is None:
            weights.pop("lm_head.weight", None)
        wanted, given = ({n: tuple(t.shape) for n, t in state.items()} for state in (self.state_dict(), weights))
        if names := sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n)):
            raise ValueError(f"{source} does not fit the model: {', '.join(names[:6])}{' ...' if names[6:] else ''}")
        self.load_state_dict(weights)


# Fields of a config.json that change nothing that a forward computes here.
_INERT = re.compile(
    r"_name_or_path|_commit_hash|.*_implementation.*|architectures|(torch_)?dtype|transformers_version|model_type|"
    r"use_cache|initializer_.*|.*_token(_id|_index)?|max_position_embeddings|.*dropout.*|drop_path_rate|output_.*|"
    r"return_dict|id2label|label2id|problem_type|chunk_size_feed_forward|is_encoder_decoder|image_seq_length|"
    r"pretraining_tp|pruned_heads|tie_.*|use_bfloat16|auto_map|max_window_layers|sliding_window|rope_scaling|"
    r"rope_theta|use_mask_token|layer_types|original_max_position_embeddings"
)


def different(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> list[str]:
    """What two configs of transformers (``to_dict``) say differently and a forward depends on, a line each. Fields that
    one of them lacks have the default of their class, which is the same for both."""
    errors = []
    for name in sorted(there.keys() & here.keys()):
        a, b = there[name], here[name]
        rope = path.endswith("rope_parameters.")
        if _INERT.fullmatch(name) and not (rope and name == "rope_theta"):
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            errors += different(a, b, f"{path}{name}.")
        elif _plain(a) != _plain(b):
            errors.append(f"{path}{name} is {a!r} there, {b!r} here")
    return errors


def _plain(value: Any) -> Any:
    """The value with lists as tuples and pairs of equal sides as one number."""
    if isinstance(value, list | tuple):
        value = tuple(value)
        return value[0] if len(value) == 2 and value[0] == value[1] else value
    return value


class Tower:
    """The vision tower of one architecture: picture sizes, encoding and position ids."""

    image: tuple[str, str]
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and deviation of the pixels

    def __init__(self, config: Any, see: SizeRule | AreaRule) -> None:
        raise NotImplementedError

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) that a picture of (width, height) is resized to."""
        raise NotImplementedError

    def segment(self, size: tuple[int, int], **columns: Any) -> Segment:
        """The segment of a picture of (width, height), without pixels; ``columns`` are further fields of it."""
        raise NotImplementedError

    def look(self, model: SeesImages, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N n D"]:
        """Tokens of normalised pictures in the space of the text embeddings."""
        raise NotImplementedError

    def positions(self, positions: Tensor, pictures: list[Pictures]) -> Tensor:
        """The language model's position ids for tokens at ``positions`` (T,)."""
        raise NotImplementedError

    def blocks(self, model: Any) -> Iterator[nn.Module]:
        """The blocks of the vision tower."""
        raise NotImplementedError


class InternVL(Tower):
    """One tile of fixed size, 2 x 2 patches to a token, one position id each."""

    image = ("<img>", "</img>")
    statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's

    def __init__(self, config: Any, see: SizeRule | AreaRule) -> None:
        (height, width), (rows, columns) = config.vision_config.image_size, config.vision_config.patch_size
        if height // rows != width // columns:
            raise ValueError(f"InternVL takes square grids of patches, not {height // rows} x {width // columns}")
        self.width, self.height = width, height
        self.grid = (int(height // rows * config.downsample_ratio), int(width // columns * config.downsample_ratio))

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The fixed (width, height) of a tile."""
        return self.width, self.height

    def segment(self, size: tuple[int, int], **columns: Any) -> Segment:
        """A segment of one tile, whose grid is always the same."""
        return Segment(Kind.VISION, (NONE,) * (self.grid[0] * self.grid[1]), grid=self.grid, **columns)

    def look(self, model: SeesImages, pixels: Tensor) -> Tensor:
        """Tokens of (N, 3, H, W) tiles, (N, n, D)."""
        features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        assert isinstance(features, Tensor)
        return features

    def positions(self, positions: Tensor, pictures: list[Pictures]) -> Tensor:
        """``positions``: a picture token has one position id."""
        return positions

    def blocks(self, model: nn.Module) -> Iterator[nn.Module]:
        """The blocks of InternViT."""
        yield from model.get_submodule("vision_tower.encoder.layer").children()


class Qwen25VL(Tower):
    """Grids of any shape, 2 x 2 patches to a token; a token's position is (time, row, column)."""

    image = ("<|vision_start|>", "<|vision_end|>")
    statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # CLIP's

    def __init__(self, config: Any, see: SizeRule | AreaRule) -> None:
        vision = config.vision_config
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.see = see
        if see.stride % (self.patch * self.merge):
            raise ValueError(f"pictures must come in multiples of {self.patch * self.merge} pixels, not {see.stride}")

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) that ``see`` chooses."""
        return self.see(*size)

    def segment(self, size: tuple[int, int], **columns: Any) -> Segment:
        """A segment whose grid has a token for 2 x 2 patches; positions advance by its longer side."""
        width, height = self.size(size)
        grid = (height // (self.patch * self.merge), width // (self.patch * self.merge))
        ids = (NONE,) * (grid[0] * grid[1])
        return Segment(Kind.VISION, ids, grid=grid, shared=True, advance=max(grid), **columns)

    def look(self, model: SeesImages, pixels: Tensor) -> Tensor:
        """Tokens of (N, 3, H, W) pictures, (N, n, D), one for 2 x 2 patches."""
        p, m = self.patch, self.merge
        patches = rearrange(pixels, "N c (h m p) (w n q) -> N (h w m n) c p q", p=p, q=p, m=m, n=m)
        patches = repeat(patches, "N l c p q -> (N l) (c t p q)", t=self.frames)
        grid = torch.tensor([[1, pixels.shape[-2] // p, pixels.shape[-1] // p]] * len(pixels), device=pixels.device)
        features = model.get_image_features(pixel_values=patches, image_grid_thw=grid, return_dict=True)
        return torch.stack(list(features.pooler_output))

    def positions(self, positions: Tensor, pictures: list[Pictures]) -> Tensor:
        """(time, row, column) ids, (3, T): a picture's rows and columns count from its first position."""
        out = repeat(positions, "T -> a T", a=3).clone()
        for group in pictures:
            rows, columns = (
                x.to(out.device).flatten() for x in torch.meshgrid(*map(torch.arange, group.grid), indexing="ij")
            )
            out[1, group.tokens] += rows
            out[2, group.tokens] += columns
        return out

    def blocks(self, model: nn.Module) -> Iterator[nn.Module]:
        """The blocks of the vision transformer."""
        yield from model.get_submodule("visual.blocks").children()


TOWERS: Mapping[str, type[Tower]] = {"internvl": InternVL, "qwen2_5_vl": Qwen25VL}


def _transformers() -> Any:
    """transformers, with ``_attention`` registered. Raises ``ValueError`` where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"vision-language models need transformers: {install('hf')}") from error
    transformers.AttentionInterface.register(ATTENTION, _attention)
    return transformers


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, attend: Attend, **_: Any):
    """transformers' attention call on (1, heads, T, D), answered by ``attend``."""
    assert mask is None and abs(scaling * q.shape[-1] ** 0.5 - 1) < 1e-6
    out = attend(module.layer_idx, *(x[0].transpose(0, 1) for x in (q, k, v)))
    return out[None], None
