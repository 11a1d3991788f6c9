"""LaVIT.

* `lavit_tokenizer`: every stage of both paths with the recorded noise, the token merger and the
token selector alone;
  of the projector only the first 64 rows are recorded.
* `lavit_decoder`: features of images of several lengths → conditions of a U-Net, both heads.
* `lavit_generation`: image tokens generated with guidance, the scores at each call; conditions,
latents and images.
* `lavit_understanding`: embeddings and masks of images and questions, captions and answers before
lemmatising,
  generation settings, questions of the benchmarks.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from kinds.drawing import network
from runner import CLOSE, EXACT, Tensors, assert_close, assert_same
from torch import Tensor

from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.lavit.decoder import CodeDecoder, Head, LavitDecoderConfig
from seed_multimodal.models.lavit.diffusion import LavitDetokenizer
from seed_multimodal.models.lavit.modeling import (
    DynamicTokenizer,
    LavitTokenizerConfig,
    causal_mask,
    dropped_mask,
    kept_rows,
)
from seed_multimodal.models.lavit.pipeline import LavitFamily
from seed_multimodal.models.lavit.processing import (
    ANSWER_ENDS,
    CAPTION_ENDS,
    LavitTokenizer,
    LavitVocabulary,
    QuestionProcessor,
    read_prompt,
)
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.state_dicts import assign_strictly

START = 32000
END = 32001
FIRST_CODE = 32002
MLP_RATIO = 4.3637  # original; its product with the width is truncated
STEPS = 4
GUIDANCE = 7.0
QUESTION_WORDS = 5
# Recorded names of settings → fields of GenerationSettings.
SETTINGS = {
    "guidance_scale": "guidance",
    "use_nucleus_sampling": "do_sample",
    "max_length": "max_new_tokens",
    "min_length": "min_new_tokens",
}


# ---- tokenizer


def build(sizes: dict[str, int], weights: Tensors) -> DynamicTokenizer:
    hidden = int(sizes["width"] * sizes["mlp_ratio"])
    vit = EvaConfig(
        image_size=sizes["img"],
        patch_size=sizes["patch"],
        width=sizes["width"],
        depth=sizes["enc_layers"],
        heads=sizes["heads"],
        mlp_width=hidden,
    )
    model = DynamicTokenizer(
        LavitTokenizerConfig(
            vit=vit,
            vit_head=sizes["encoder_head_out"],
            merger_depth=sizes["layers"],
            merger_heads=sizes["heads"],
            merger_mlp_width=hidden,
            codebook_size=sizes["n_code"],
            codebook_dim=sizes["code_dim"],
            llm_width=len(weights["vit_proj.bias"]),
        )
    )
    assign_strictly(model, weights, "lavit_tokenizer")
    return model.eval()


def check_codes(model, image: Tensor, want: Tensors, ids: dict):
    features = model.patch_features(image)
    noise = want["gumbel_noise"]  # of the selection, which is random in the original
    selection = model.select(features, noise=noise)
    assert_close(features, want["encoder"][:, 1:], *CLOSE, "encoder")
    want.close("keep", selection.keep_BN, EXACT)
    merger = model.causal_encoder
    causal = causal_mask(selection.keep_BN)
    dropped = dropped_mask(selection.keep_BN)
    source = merger.ln_vision(features)
    block = merger.blocks[0]
    attended = block.token_causal_attn(block.norm0(features), causal)
    cross = block.token_cross_attn(block.norm1(features + attended), source, dropped)
    merged = model.merge(features, selection.keep_BN)
    rows, counts = kept_rows(merged, selection.keep_BN)
    want.close("token_nums", counts, EXACT)
    want.compare(
        log_probs=selection.log_probs_BN2,
        merger_ln_vision=source,
        merger_block0_causal_attn=attended,
        merger_block0_cross_attn=cross,
        merger_block0=block(features, source, causal, dropped),
        merger=merged,
        to_quantizer=model.to_codebook(rows),
    )
    want.close("quantized", model.quantize_rows(rows)[1], (1e-6, 0))

    # The same codes in one call, as token ids, and back to embeddings.
    codes = model.encode(image, noise=noise)
    token_ids = [[FIRST_CODE + code for code in row.tolist()] for row in codes]
    assert_same(token_ids, ids["token_ids"], "token ids")
    assert_same(
        [[START, *row, END] for row in token_ids],
        ids["token_ids_special"],
        "token ids with markers",
    )
    want.close("quantized", model.embed_codes(torch.cat(codes)), (0, 0))


def check_continuous(model, image: Tensor, want: Tensors, counts: list[int]):
    features = model.patch_features(image)
    keep = model.select(features, noise=want["gumbel_noise"]).keep_BN
    want.close("keep", keep, EXACT)
    want.close("merger", model.merge(features, keep))
    rows = model.project(features, keep)
    assert_same([*map(len, rows)], counts, "features: rows of each image")
    for index, row in enumerate(rows):
        recorded = want[f"{index}.first_64_columns"]
        assert_close(row[:, : recorded.shape[1]], recorded, 1e-5, 1e-4, f"features.{index}")


@torch.no_grad()
def check_tokenizer(recording):
    (sizes, weights, inputs, outputs) = recording.case()
    meta = recording.meta
    model = build(sizes, weights)
    image = inputs["image"]
    check_codes(model, image, outputs.part("tokenize"), meta)
    check_continuous(model, image, outputs.part("features"), meta["feature_counts"])

    # The merger and the selector alone, for decisions that no noise gives.
    manual = outputs.part("manual")
    features = model.patch_features(image)
    manual.compare(
        merger=model.merge(features, manual["decisions"]),
        predictor=model.token_predictor(features, manual["predictor_policy"]),
    )


# ---- decoder


def code_decoder(
    sizes, features: int, widths: list[int], head: Head, weights: Tensors
) -> CodeDecoder:
    """A decoder of a fixture's sizes."""
    decoder = CodeDecoder(
        LavitDecoderConfig(
            head=head,
            tokens=(sizes["img_size"] // sizes["patch_size"]) ** 2,
            code_dim=sizes["in_chans"],
            width=sizes["embed_dim"],
            depth=sizes["depth"],
            heads=sizes["num_heads"],
            mlp_width=int(sizes["embed_dim"] * MLP_RATIO),
            feature_dim=features,
            prompt_dim=widths[0],
            pooled_dim=widths[1],
        )
    ).eval()
    assign_strictly(decoder, weights, head)
    return decoder


@torch.no_grad()
def check_decoder(recording):
    case, weights, case_inputs, want = recording.case()
    heads = ("lowres", "highres")
    for head in heads:
        decoder = code_decoder(
            case[head], case["decoder_out_dim"], case["unet_dims"], head, weights.part(head)
        )
        # Images of several lengths lie behind one another.
        rows = case_inputs[f"{head}.x"].split(case_inputs[f"{head}.token_num"].tolist())
        normed = []
        hook = decoder.norm.register_forward_hook(
            lambda module, inputs, output, normed=normed: normed.append(output)
        )
        features = decoder.features(rows)
        hook.remove()
        conditions = decoder(rows)
        results = {
            "norm": normed[0],
            "decode_task": features,
            "output": conditions.prompt_embeds,
            "prompt_embeds": conditions.prompt_embeds,
            "pooled": conditions.pooled,
        }
        want.part(head).compare(**{name: results[name] for name in want.part(head)})


# ---- generation


def check_generation(recording):
    config = recording.config
    cases = recording.cases
    weights = recording.weights
    outputs = recording.outputs
    check_images(config, cases, weights, outputs)
    tokenizer = LavitTokenizer.from_pretrained(
        recording.folder / "tokenizer", LavitVocabulary(n_codes=config["visual_codes"])
    )
    llm = language_model(config, weights)
    for case in cases["cases"]:
        check_case(case, llm, tokenizer, weights["llm.row_ids"], outputs)


@torch.no_grad()
def check_images(config, cases, weights: Tensors, want: Tensors):
    """Conditions of the recorded tokens, and the images of every recorded size."""
    import diffusers

    sizes = config["decoder"]
    decoder = code_decoder(
        sizes, sizes["decoder_out_dim"], sizes["unet_dims"], "highres", weights.part("decoder")
    )
    codes = [
        torch.tensor([id - FIRST_CODE for id in ids if id >= FIRST_CODE])
        for ids in cases["image_tokens"]
    ]
    rows = [weights["quantize.embedding.weight"][image_codes] for image_codes in codes]
    conditions = decoder(rows)
    want.compare("image_embeds.", prompt=conditions.prompt_embeds, pooled=conditions.pooled)
    model = LavitDetokenizer(
        network("UNet2DConditionModel", config["unet"], weights.part("unet")),
        network("AutoencoderKL", config["vae"], weights.part("vae")),
        diffusers.DDIMScheduler.from_config(config["scheduler"]),
        decoder=decoder,
    )
    for name, case in cases["decoder_cases"].items():
        check_latents(model, rows, case, f"pixels.{name}", want)


def check_latents(model: LavitDetokenizer, rows: list[Tensor], case, name, want: Tensors):
    """The recorded noise has one latent for eight pixels, independent of the tiny VAE."""
    start = want[f"{name}.initial_latents"]
    settings = model.check_settings(num_inference_steps=STEPS, guidance_scale=GUIDANCE, **case)
    latents = model.denoise(settings, [torch.Generator()] * len(start), rows, start=start)
    want.close(f"{name}.vae_input", latents / model.vae.config.scaling_factor, (1e-3, 1e-3))
    pixels = model.decode(latents).mul(255).round().permute(0, 2, 3, 1)
    want.close(f"{name}.image_uint8", pixels, (2, 0))


def language_model(config, weights: Tensors):
    """The recorded model; rows of unused tokens are zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = LlamaForCausalLM(LlamaConfig(**config["llm"])).eval()
    state = {
        name.removeprefix("llm."): value
        for name, value in weights.items()
        if name.startswith("llm.model.")
    }
    for name, rows in (("model.embed_tokens", "embed"), ("lm_head", "lm_head")):
        table = torch.zeros(config["llm"]["vocab_size"], config["llm"]["hidden_size"])
        table[weights["llm.row_ids"]] = weights[f"llm.{rows}_rows"]
        state[f"{name}.weight"] = table
    llm.load_state_dict(state)
    return llm


def check_case(case, llm, tokenizer, rows: Tensor, outputs: Tensors):
    """Image tokens, and the scores at each call: of the prompts and of the negative prompts."""
    # 1. The prompts and settings.
    label = case["label"]
    options = dict(case["kwargs"])
    of_images = options.pop("is_token_prompt", False)
    negatives = options.pop("uncond_input_ids", None) or [None]
    positives = [
        tokenizer.text_ids(prompt) if isinstance(prompt, str) else prompt
        for prompt in case["prompts"]
    ]
    if len(negatives) == 1:
        negatives = negatives * len(positives)
    prompts = [Prompt(ids, negative=row) for ids, row in zip(positives, negatives, strict=True)]
    renamed = {SETTINGS[key]: value for key, value in options.items()}
    if of_images:  # the original generated as many new tokens as the longest prompt has
        renamed["max_new_tokens"] = max(map(len, positives))
    settings = GenerationSettings(
        **{**LavitFamily.defaults["draw"], "images": "forced", **renamed}  # the original's defaults
    )

    # 2. Scores while no answer is finished. A pass has rows of prompts and negative prompts.
    n_rows = len(prompts)
    if settings.guidance != 1:
        n_rows = 2 * n_rows
    scores = []

    def record(module, inputs, output: Tensor):
        if len(output) == n_rows:
            step = n_rows // len(prompts)
            scores.extend(output[row::step].clone() for row in range(step))

    handle = llm.lm_head.register_forward_hook(record)
    engine = Engine(TorchBackend(llm, max_rows=2 * len(prompts)), tokenizer)
    eoi = tokenizer.vocabulary.eoi_id
    settings = dataclasses.replace(settings, stop_token_ids=(eoi,))
    answers = engine.generate(prompts, settings)
    handle.remove()
    assert 0 < len(scores) <= case["num_forward_calls"], label
    for call, actual in enumerate(scores):
        if (recorded := outputs.get(f"{label}.call{call}.last_logits")) is not None:
            assert_close(actual[:, rows], recorded, 1e-4, 1e-4, f"{label}: scores of call {call}")

    # 3. Recorded answers are padded behind their end.
    for ids, recorded in zip(answers, case["output"], strict=True):
        assert_same(ids, recorded[: len(ids)], f"{label}: ids")
        assert ids[-1] == eoi or len(recorded) == len(ids), f"{label}: missing ids"


# ---- understanding


def check_understanding(recording):
    cases = recording.cases
    inputs = recording.inputs
    outputs = recording.outputs
    vocabulary = LavitVocabulary()
    width = outputs["visual.embeds"].shape[-1]
    # The original's table of embeddings was this.
    table = torch.sin(torch.arange(vocabulary.code_start * width, dtype=torch.float32))
    embed = table.view(-1, width).__getitem__

    # 1. Images alone, and with a question behind each.
    features = [inputs[f"features.{index}"] for index in range(len(cases["counts"]))]
    assert_same([len(row) for row in features], cases["counts"], "numbers of tokens")
    images = [embeddings(read_prompt(vocabulary, [row]), embed) for row in features]
    check_padded(images, outputs["visual.embeds"], outputs["visual.attention"], "images")
    prompts = zip(inputs["prompt_ids"], inputs["prompt_attention"], strict=True)
    texts = [ids[mask.bool()].tolist() for ids, mask in prompts]
    rows = [
        embeddings(read_prompt(vocabulary, [row], text), embed)
        for row, text in zip(features, texts, strict=True)
    ]
    check_padded(
        rows, outputs["joined.embeds"], outputs["joined.attention"], "images and questions"
    )

    # 2. What becomes of answers, and the settings of both tasks.
    check_texts(cases, MultimodalTokenizer.from_pretrained(recording.tokenizer_folder))
    for task, recorded_task in (("describe", "caption"), ("ask", "answer")):
        settings = GenerationSettings(**LavitFamily.defaults[task])
        check_settings(settings, cases[f"{recorded_task}_generation_settings"], vocabulary)


def embeddings(prompt: Prompt, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The embeddings of a prompt's ids and features, as a backend makes them."""
    rows = embed(torch.tensor(prompt.ids)).clone()
    for image in prompt.images:
        rows[list(image.positions)] = image.features
    return rows


def check_padded(rows: Sequence[Tensor], recorded: Tensor, visible: Tensor, what):
    """Recorded rows are padded on the left."""
    for row, wanted, mask in zip(rows, recorded, visible, strict=True):
        assert_close(row, wanted[-len(row) :], 1e-6, what=what)
        assert_same(mask.tolist(), [0] * (len(mask) - len(row)) + [1] * len(row), f"mask of {what}")


def check_texts(cases, tokenizer):
    """Where captions and answers end, as the engine's reader cuts them."""
    columns = {
        "result": CAPTION_ENDS,
        "result_with_prompt": CAPTION_ENDS,
        "result_before_lemmatising": ANSWER_ENDS,
    }
    for case in (*cases["caption"], *cases["answers"]):
        ids = tokenizer.encode(case["decoded"])
        for column in columns.keys() & case.keys():
            parts = AnswerReader(tokenizer, columns[column]).read_all(ids).parts
            text = "".join(map(str, parts)).strip()
            assert_same(text, case[column].strip(), case["decoded"])
    for question, cleaned in cases["question_processor"]:
        assert_same(QuestionProcessor(QUESTION_WORDS)(question), cleaned, question)


def check_settings(settings: GenerationSettings, recorded, vocabulary):
    """All recorded settings; of embeddings and their mask only shapes are recorded."""
    actual = {
        **dataclasses.asdict(settings),
        "do_sample": settings.samples,
        "suppress_tokens": [START, vocabulary.size - 1, vocabulary.size - START],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    actual = {key: actual.get(key) for key in recorded}
    # The number of answers has one value here.
    ignored = dict.fromkeys(("inputs_embeds", "attention_mask", "num_return_sequences"))
    assert_same(actual | ignored, recorded | ignored, "generation settings")


KINDS = {
    "lavit_tokenizer": check_tokenizer,
    "lavit_decoder": check_decoder,
    "lavit_generation": check_generation,
    "lavit_understanding": check_understanding,
}
# The guidance by itself; the scores of each call hold it.
UNREAD = {"lavit_generation": ("cfg.*",)}
