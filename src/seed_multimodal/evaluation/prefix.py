"""`seed eval prefix`: what the first 1, 2, 4, … codes of an image hold, for any tokenizers.

A curve for each tokenizer, and one for the first tokenizer's codes in a shuffled order of their
positions, the same for all images: a control without an order. Codes of a prefix stay in their
places, the others are left out. With 95 % intervals:

psnr        of the image that is drawn from the prefix, in dB
cosine, r1  of the drawn image's embedding to the image's; whether it is the nearest of all images
probe       share of labels that a linear probe reads from what the de-tokenizer reads
judge       score of the drawn image by a registered reward, such as its share of right labels

Writes prefix.json, prefix.md (a table), curves.png and sheet.png.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.record import FieldValue, as_list
from seed_multimodal.device import FP16_AS_ORIGINAL, Runtime, choose_device
from seed_multimodal.disk import JsonObject, replace_text, writable_folder, writing
from seed_multimodal.errors import ConfigError, DataError, pluralize
from seed_multimodal.evaluation.metrics import (
    Estimate,
    bootstrap,
    finite_json,
    grouped,
    plain,
    psnr,
)
from seed_multimodal.evaluation.tokenizer import (
    DRAW_BATCH,
    NONE,
    Log,
    OpenedTokenizer,
    Pass,
    image_nearness,
    open_tokenizer,
    report_head,
    run_pass,
)
from seed_multimodal.evaluation.tokenizer_settings import PrefixSettings, TokenizerSettings
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.images import CodeCodec
from seed_multimodal.plots import save_figure
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.settings import nearest

MEASURES = {
    "psnr": "PSNR, dB",
    "cosine": "cosine",
    "r1": "R@1",
    "probe": "labels, linear probe",
    "judge": "judge",
}
SHOWN = 8  # images of the sheet
PENALTY = 0.01  # of the ridge regression, for each sample of standardized features
Columns = Mapping[str, Sequence[object]]  # name of a label → the classes of all images


def evaluate_prefixes(settings: PrefixSettings, log: Log = print) -> JsonObject:
    """Evaluate, write to `settings.out`, and return the report as JSON values.

    Raises:
        DataError: see `run_pass`; images without labels.
        CheckpointError: as `open_tokenizer`; a tokenizer without de-tokenizer.
        ConfigError: no such judge, an unusable folder.
    """
    folder = writable_folder(settings.out, ConfigError)
    runtime = choose_device(settings.device, settings.dtype, log=log, fp16=FP16_AS_ORIGINAL)
    source = open_pairs(settings.pairs())
    rng = np.random.default_rng(settings.seed)
    rows = rng.permutation(len(source))[: settings.limit].tolist()
    entries: list[JsonObject] = []
    sheet: list[Row] = []
    measures: _Measures | None = None
    for name in settings.model:
        # 1. The tokenizer; the first one's target encoder compares the drawings of all.
        SystemConfig.find(name).check_ability("codes_are_rows")
        clip = settings.clip if measures is None else NONE
        of_model = TokenizerSettings(model=name, data=settings.data, out=settings.out, clip=clip)
        opened = open_tokenizer(of_model, runtime)
        codec = opened.codec
        _ = codec.decoder  # loaded now, so that a missing one is an error now

        # 2. Codes of the images, and of those that train the probe.
        encoded = run_pass(source, rows, opened, batch=settings.batch, log=log, kept=len(rows))
        probed = None
        if settings.probe is not None:
            probe_source = open_pairs(settings.probe_pairs())
            probe_rows = range(min(settings.probe_images, len(probe_source)))
            probed = run_pass(probe_source, probe_rows, opened, batch=settings.batch, log=log)

        # 3. Prefixes of them, of the first tokenizer in two orders.
        n_codes = codec.codes_per_image
        orders = {name: np.arange(n_codes)}
        if measures is None:
            measures = _Measures(settings, runtime, opened, encoded)
            sheet.append(Row("image", list(map(Cell, encoded.images[:SHOWN]))))
            orders[f"{name}, shuffled"] = rng.permutation(n_codes)
        counts = [*(2**power for power in range((n_codes - 1).bit_length())), n_codes]
        for (label, order), count in itertools.product(orders.items(), counts):
            prefixes = first_codes(encoded, order, count)
            features, images = measures.decoded(codec, prefixes)
            values = measures.of_images(images, encoded.images)
            if probed is not None:
                train, _ = measures.decoded(codec, first_codes(probed, order, count), draws=False)
                values["probe"] = measures.of_probe(train, probed.labels, features)
            n_held = round(float((prefixes >= 0).sum(1).double().mean()), 2)
            entries.append({"tokenizer": label, "codes": count, "mean_codes": n_held, **values})
            title = f"{label}, {pluralize(count, 'code')}"
            sheet.append(Row(title, list(map(Cell, images[:SHOWN]))))
            log(title)

    # 4. The files.
    head = report_head(settings, runtime, encoded)
    report: JsonObject = plain({**head, "prefixes": entries})
    save_curves(entries, folder / "curves.png")
    with writing(folder, ConfigError):
        replace_text(folder / "prefix.json", finite_json(report, str(folder), indent=1) + "\n")
        replace_text(folder / "prefix.md", table(entries))
        contact_sheet(sheet, f"{head['n']} images", cell=96).save(folder / "sheet.png")
    return report


class _Measures:
    """What measures the prefixes of all tokenizers, on the images of a pass of the first one."""

    def __init__(
        self, settings: PrefixSettings, runtime: Runtime, opened: OpenedTokenizer, encoded: Pass
    ) -> None:
        self.settings = settings
        self.encoder = opened.target
        if self.encoder is not None:
            self.target = torch.from_numpy(encoded.features["target"]).to(runtime.device)
        self.columns: Columns = {}
        if (settings.probe or settings.judge) is not None:
            self.columns = class_columns(encoded.labels)
        self.judge = None
        if settings.judge is not None:
            name, _, model = settings.judge.partition(":")
            entries = registered("rewards")
            if name not in entries:
                raise ConfigError(f"--judge: {name!r} is not registered{nearest(name, entries)}.")
            self.records = [
                {"labels": value if isinstance(value, Mapping) else as_list(value)}
                for value in encoded.labels
            ]
            open_judge = import_entry(entries[name])
            self.judge = open_judge(model or name, self.records, runtime.device)

    @torch.inference_mode()
    def decoded(
        self, codec: CodeCodec, codes: Tensor, draws: bool = True
    ) -> tuple[Tensor, list[Image.Image]]:
        """What a conditioner reads of codes `[N, n]`, `[N, D]`, and the images drawn from them."""
        features: list[Tensor] = []
        images: list[Image.Image] = []
        for rows in codes.split(DRAW_BATCH):
            with codec.encoding():
                inputs = codec.decoder_inputs(rows)
            features.append(codec.decoder.read(inputs)[1].flatten(1).cpu().double())
            if draws:
                images += codec.decoder(inputs, seeds=[self.settings.seed] * len(rows))
        return torch.cat(features), images

    def of_images(
        self, images: Sequence[Image.Image], originals: Sequence[Image.Image]
    ) -> JsonObject:
        """The measures of drawings."""
        values: JsonObject = {"psnr": bootstrap(list(map(image_psnr, images, originals)))}
        if self.encoder is not None:
            nearness = image_nearness(images, self.encoder, self.target)
            values |= {"cosine": nearness["cosine"], "r1": nearness["image_r1"]}
        if self.judge is not None:
            values["judge"] = bootstrap(self.judge(images, self.records))
        return values

    def of_probe(self, train: Tensor, labels: Sequence[FieldValue], test: Tensor) -> Estimate:
        """The share of an image's labels that a ridge regression predicts.

        train, test: features `[N, D]` of images with these labels, and of those that are measured.
        """
        # 1. How much each image of `train` counts for those of `test`, on standardized features. In
        #    the dual form, since there may be more features than images.
        mean = train.mean(0)
        scale = train.std(0).clamp(min=1e-6)
        train = (train - mean) / scale
        kernel = train @ train.T
        kernel.diagonal().add_(PENALTY * len(train))
        weights = torch.linalg.solve(kernel, train @ ((test - mean) / scale).T).T  # [test, train]

        # 2. The likeliest class of each label.
        hits: list[list[bool]] = []
        columns = class_columns(labels)
        if columns.keys() != self.columns.keys():
            raise DataError("The images of --probe have other labels than those of --data.")
        for name, column in columns.items():
            wanted = self.columns[name]
            classes = sorted(set(column), key=str)
            indices = torch.tensor([classes.index(value) for value in column])
            targets = F.one_hot(indices, len(classes)).double()
            frequency = targets.mean(0)
            predicted = (weights @ (targets - frequency) + frequency).argmax(1).tolist()
            hits.append([classes[i] == value for i, value in zip(predicted, wanted, strict=True)])
        return bootstrap(np.mean(hits, axis=0))


def class_columns(labels: Sequence[FieldValue]) -> Columns:
    """For each label the classes of all images, by its name; those of a list have numbers.

    Raises DataError: an image without, or others.
    """
    rows: list[Mapping[str, object]] = []
    for value in labels:
        items = enumerate(as_list(value))
        rows.append(value if isinstance(value, Mapping) else {str(n): item for n, item in items})
    names = rows[0].keys()
    if any(row.keys() != names or None in row.values() for row in rows):
        raise DataError("Not every image has the same labels, under `labels` or `label`.")
    return {name: [row[name] for row in rows] for name in names}


def first_codes(encoded: Pass, order: np.ndarray, count: int) -> Tensor:
    """The first `count` codes of each image in an order of positions, -1 in place of the others."""
    codes = torch.from_numpy(encoded.features["codes"])
    ordered = codes[:, order]
    is_code = ordered >= 0
    is_kept = is_code & (is_code.cumsum(1) <= count)
    kept = torch.full_like(codes, -1)
    kept[:, order] = ordered.masked_fill(~is_kept, -1)
    return kept


def image_psnr(drawn: Image.Image, image: Image.Image) -> float:
    """PSNR in dB of a drawing against the image in its size."""
    wanted = image.convert("RGB").resize(drawn.size, Image.Resampling.BICUBIC)
    difference = np.asarray(drawn.convert("RGB"), np.float64) - np.asarray(wanted, np.float64)
    return psnr(np.square(difference).mean())


# ---- what is written


def table(entries: Sequence[JsonObject]) -> str:
    """A Markdown table of means with their intervals."""
    names = [name for name in MEASURES if name in entries[0]]
    rows = [["tokenizer", "codes", *(MEASURES[name] for name in names)]]
    rows.append(["---"] * len(rows[0]))
    for entry in entries:
        row = [entry["tokenizer"], f"{entry['codes']} ({entry['mean_codes']:g})"]
        for name in names:
            value = entry[name]
            row.append(f"{value.value:.3g} ({value.low:.3g}–{value.high:.3g})")
        rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def save_curves(entries: Sequence[JsonObject], file: Path) -> None:
    """A panel for each measure, a curve with its intervals for each tokenizer."""
    from matplotlib.figure import Figure

    names = [name for name in MEASURES if name in entries[0]]
    figure = Figure(figsize=(3.2 * len(names) + 0.3, 3.2), dpi=110, layout="constrained")
    curves = grouped(entries, [entry["tokenizer"] for entry in entries])
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.set_title(MEASURES[name], fontsize=9, loc="left")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("codes")
        axes.grid(alpha=0.4)
        for label, curve in curves.items():
            counts = [entry["mean_codes"] for entry in curve]
            means, lows, highs, _ = zip(*(astuple(entry[name]) for entry in curve), strict=True)
            [line] = axes.plot(counts, means, marker=".", label=label)
            axes.fill_between(counts, lows, highs, color=line.get_color(), alpha=0.2)
    axes.legend(fontsize=7)
    save_figure(figure, file)
