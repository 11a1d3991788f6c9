"""A row of a study of tokenizers: `python -m seed_nano.train study --preset quick seed=1
quantizer.kind=fsq ...`.

nano's frozen vision encoder, stage 2 of the tokenizer, its codes of scenes, a small language model
over them, and what both can do, in `WORK/measures.done.json`. Settings are the row. All start from
nano's Q-Former, which was trained with 32 causal queries; drawings are those of nano's
de-tokenizer, which reads any of the tokenizers' embeddings.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.device import choose_device
from seed_multimodal.disk import JsonObject, read_json_object, replace_text
from seed_multimodal.evaluation.metrics import bootstrap, plain
from seed_multimodal.evaluation.prefix import evaluate_prefixes
from seed_multimodal.evaluation.tokenizer_settings import PrefixSettings
from seed_multimodal.images.transforms import ImageTransform, normalise
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.lavit.spec import LavitConfig
from seed_multimodal.models.seed.checkpoints import ENCODER_PARTS
from seed_multimodal.models.seed.pipeline import SeedLlamaFamily
from seed_multimodal.nn.quantizer import VectorQuantizer
from seed_multimodal.pipelines.assemble import join
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.images import CodeCodec, Placement
from seed_multimodal.recipes.seed.export import part_of
from seed_multimodal.state_dicts import (
    assign_strictly,
    load_state_dict,
    save_state_dict,
    save_torch,
)
from seed_nano.labels import LabelHeads
from seed_nano.report.judge import Judge
from seed_nano.report.samples import Samples, Sizes, make_samples
from seed_nano.report.scoring import Section
from seed_nano.report.sections import Run, caption, codes, drawing, qa, reconstruction
from seed_nano.report.systems import System
from seed_nano.train.assemble import (
    copy_llm,
    finish,
    start_nano,
    system_settings,
    trained_folder,
    write_text_tokenizer,
)
from seed_nano.train.task import map_scenes, to_signed
from seed_nano.train.tokenizer import CHECKPOINT, write_initial_llm, write_records
from seed_nano.train.vision import (
    HEADS_FILE,
    LABELS,
    READOUT_FILE,
    REDUCED,
    label_loss,
    pool_features,
)
from seed_nano.train.workspace import LavitWorkspace, SuccessorWorkspace, resolve_path
from seed_nano.world.scene import Scene
from seed_nano.world.targets import label_tensor
from seed_nano.world.words import describe

QUERY_NOISE = 0.02
READER_STEPS = 300
READER_BATCH = 512
CODED = 4000  # training scenes whose codes are counted
SPLITS = ("val", "styles")  # known compositions; things in a style in which they were never seen
NO_FIGURE = {"value": None}
NO_PREFIX = {"8": {"probe": NO_FIGURE, "r1": NO_FIGURE}}


def start_study(space: SuccessorWorkspace) -> None:
    """The text tokenizer, the frozen parts of the finished nano, and in place of stage 1 its
    Q-Former: with noise, so that none of any number of queries is another's copy."""
    start_nano(space)
    shutil.copytree(space.nano / "diffusion_model", space.decoder_folder, dirs_exist_ok=True)
    state = load_state_dict(space.nano / "model.safetensors")
    encoder = {name: state[name] for name in state if part_of(name) in ENCODER_PARTS[1:]}
    queries = encoder["query_tokens"].float()  # [1, 32, D]
    n_queries = space.config.quantizer.queries
    repeats = math.ceil(n_queries / queries.shape[1])
    queries = queries.repeat(1, repeats, 1)[:, :n_queries]
    torch.manual_seed(space.config.seed)
    encoder["query_tokens"] = queries + QUERY_NOISE * torch.randn_like(queries)
    stage1 = space.work / "stage1"
    stage1.mkdir(parents=True, exist_ok=True)
    save_torch({"model": encoder}, stage1 / CHECKPOINT)


def fit_readers(space: SuccessorWorkspace) -> JsonObject:
    """Linear label heads and read-out of the frozen encoder's embeddings, as stage `clip` trains
    them, for stage 2's loss; returns their error."""
    torch.manual_seed(space.config.seed)
    embeddings = pool_features(space).float()
    labels = label_tensor(space.pool)[:, : len(LABELS)]
    pool = space.config.image_size // REDUCED
    thumbnails = map_scenes(
        lambda images: F.avg_pool2d(to_signed(images), pool).flatten(1), space.pool, space, 512
    )
    heads = LabelHeads(embeddings.shape[1], LABELS)
    readout = nn.Linear(embeddings.shape[1], thumbnails.shape[1])
    optimizer = torch.optim.Adam([*heads.parameters(), *readout.parameters()], lr=0.01)
    for _ in range(READER_STEPS):
        rows = torch.randint(len(embeddings), (READER_BATCH,))
        loss = label_loss(heads(embeddings[rows]), labels[rows])
        loss = loss + F.mse_loss(readout(embeddings[rows]), thumbnails[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_state_dict(heads.state_dict(), space.work / HEADS_FILE)
    save_state_dict({"readout": readout.weight}, space.work / READOUT_FILE)
    return {"loss": round(loss.item(), 4)}


# ---- codes of pixels, as of any other tokenizer


class PatchGrid(nn.Module):
    """Codes of pixels: at each place of a grid the nearest of `codes` mean patches of `side` pixels
    a side."""

    def __init__(self, codes: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.quantize = VectorQuantizer(codes, 3 * side**2)

    def patches(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → `[B, n, 3 · side²]`."""
        return F.unfold(pixels, self.side, stride=self.side).transpose(1, 2)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → codes `[B, n]` int64."""
        return self.quantize.nearest(self.patches(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, n]` → normalised pixels `[B, 3, S, S]`."""
        size = self.side * math.isqrt(codes.shape[1])
        rows = self.quantize.lookup(codes).transpose(1, 2)
        return F.fold(rows, (size, size), self.side, stride=self.side)


class GridCodec(CodeCodec):
    """Images ⇄ codes of a `PatchGrid`; a code is drawn as its mean patch."""

    model: PatchGrid
    can_draw = True

    def draw_batch(self, key: object, rows: Sequence[tuple[Tensor, int]]) -> list[Image.Image]:
        """Codes and seed of each image → images; seeds have no effect."""
        pixels = self.model.decode(torch.stack([codes for codes, _ in rows]).to(self.device))
        return list(map(self.transform.to_image, pixels))


def start_grid(space: SuccessorWorkspace) -> None:
    """The text tokenizer, and the mean patches of scenes of the pool, by k-means."""
    config = space.config
    n_patches = (config.image_size // config.grid.side) ** 2
    write_text_tokenizer(space, config.grid.codes, n_patches)
    torch.manual_seed(config.seed)
    grid = PatchGrid(config.grid.codes, config.grid.side)
    patches = map_scenes(
        lambda images: grid.patches(normalise(images)).cpu(), space.pool, space, batch=256
    )
    grid.quantize.init_from(patches.flatten(0, 1))
    save_state_dict(grid.state_dict(), space.tokenizer_folder / "model.safetensors")


def load_grid(space: SuccessorWorkspace) -> PatchGrid:
    """The grid of `start_grid`, on the device."""
    grid = PatchGrid(space.config.grid.codes, space.config.grid.side)
    file = space.tokenizer_folder / "model.safetensors"
    assign_strictly(grid, load_state_dict(file), file)
    return grid.to(space.device)


def grid_records(space: SuccessorWorkspace) -> dict[str, int]:
    """Stage `records` of a grid."""
    write_initial_llm(space, sections=1)
    grid = load_grid(space)

    def encode(scenes: Sequence[Scene]) -> Tensor:
        return map_scenes(lambda images: grid.encode(normalise(images)), scenes, space, batch=512)

    return write_records(space, encode)


def measure_grid(space: SuccessorWorkspace) -> JsonObject:
    """As `measure`, without prefixes: these codes have no order."""
    config = SystemConfig.find(space.out)
    tokenizer = MultimodalTokenizer.from_pretrained(space.tokenizer_folder)
    runtime = choose_device(str(space.device), torch.float32, log=None)
    placement = Placement(runtime, runtime, runtime)
    codec = GridCodec(
        load_grid(space),
        placement,
        transform=ImageTransform(space.config.image_size),
        codebook_size=space.config.grid.codes,
        codes_per_image=tokenizer.vocabulary.tokens_per_image,
    )
    family = SeedLlamaFamily.of_parts(config, tokenizer, codec, placement)
    return {**measure_system(space, MultimodalSystem(family)), "prefix": NO_PREFIX}


# ---- results


def measure_lavit(space: LavitWorkspace) -> JsonObject:
    """As `measure` for LaVIT's dynamic codes, without drawings: they have no trained decoder."""
    join(LavitConfig, space.out, {}, system_settings(space))
    finish(space.out)
    inner = MultimodalSystem.from_pretrained(
        space.out, device=str(space.device), log=None, load_decoder=False
    )
    figures = measure_system(space, inner, "language", (caption, qa))
    for split in SPLITS:
        figures[split] |= {
            "reconstruction": {"all": NO_FIGURE, "r1": NO_FIGURE},
            "drawing": {"all": NO_FIGURE},
        }
    return {**figures, "prefix": NO_PREFIX}


def assemble_study(space: SuccessorWorkspace) -> JsonObject:
    """The language model and `system.json`: a complete nano."""
    copy_llm(trained_folder(space, "llm_study"), space.out / "seed_llama")
    settings = {**system_settings(space), "image_size": space.config.image_size}
    replace_text(space.out / "system.json", json.dumps(settings, indent=1))
    return finish(space.out)


def measure_system(
    space: SuccessorWorkspace,
    inner: MultimodalSystem,
    training: str = "llm_study",
    sections: Sequence[Callable[[Run], Section]] = (reconstruction, caption, qa, drawing),
) -> JsonObject:
    """What a tokenizer and its language model can do, on each of `SPLITS`.

    bits: of an image by the language model, given its caption. codes: of training scenes, their use
    and the bits of an image. tokens_per_second: of the language model's training.

    training: its stage. sections: of `seed_nano.report`, by their names.
    """
    system = System(inner)
    judge = Judge.from_pretrained(resolve_path(space.config.judge)).to(space.device)
    record = read_json_object(space.record(training))
    figures: JsonObject = {"tokens_per_second": round(record["tokens"] / record["seconds"])}
    of_training = Samples("train", Sizes(), space.pool[:CODED])
    figures["codes"] = codes(Run(system, judge, of_training))
    sizes = Sizes.limited(space.config.scenes)
    for split in SPLITS:
        run = Run(system, judge, make_samples(split, sizes, space.names))
        texts = list(map(describe, run.scenes))
        likelihoods = inner.image_likelihoods(run.real[: len(texts)], texts)
        bits = [-likelihood.total / math.log(2) for likelihood in likelihoods]
        figures[split] = {"bits": bootstrap(bits)}
        figures[split] |= {section.__name__: section(run) for section in sections}
    return plain(figures)


def measure(space: SuccessorWorkspace) -> JsonObject:
    """`measure_system`, and what the first codes hold (`prefix`, see `seed eval prefix`)."""
    system = MultimodalSystem.from_pretrained(space.out, device=str(space.device), log=None)
    figures = measure_system(space, system)
    settings = PrefixSettings(
        model=[str(space.out)],
        data="nano",
        out=str(space.work / "prefix"),
        limit=space.config.scenes,
        probe="nano",
        probe_images=4 * space.config.scenes,
        device=str(space.device),
    )
    prefixes = evaluate_prefixes(settings)["prefixes"]
    ordered = [row for row in prefixes if row["tokenizer"] == str(space.out)]
    return {**figures, "prefix": {str(row["codes"]): row for row in ordered}}
