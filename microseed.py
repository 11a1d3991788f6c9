"""microseed: SEED in one file, from drawings to a model that describes and draws them.

An image becomes 16 discrete codes, a language model reads and writes codes like words, and codes
become an image again. One model that only predicts the next token can then do both:

    image -> ViT -> causal Q-Former -> codebook -> codes -> decoder -> image
    <s> <img> codes </img> words </s>      describe: continue after the codes
    <s> words <img> codes </img> </s>      draw: continue after the words

    python microseed.py                    # everything, 4 to 10 minutes on a laptop's CPU
    python microseed.py lm_steps=300       # any setting below can be changed

It needs torch, numpy, pillow and the drawings in data/nano/sprites.tar (Noto Emoji, Apache-2.0),
and runs as it reads, from top to bottom. The networks are the library's SEED-2 tokenizer and LLaMA
at a small size: a test loads the weights into the library's classes and requires equal codes,
pixels and logits. docs/explanation/microseed.md maps the names and has exercises.

Shapes: B images, N patches, Q codes of an image, K entries of a section of the codebook, D width of
the networks, d width of a code, T tokens of a sequence, V size of the vocabulary.
"""

import io
import itertools
import json
import math
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

# ---- Settings: NAME=VALUE on the command line changes one

sprites = "data/nano/sprites.tar"
out = "outputs/microseed"
seed = 0
image_size = 32  # pixels of a side
patch_size = 8  # pixels of a side of a token of the ViT
width = 128  # D
heads = 4
vit_depth = 2
qformer_depth = 2
decoder_depth = 1
lm_depth = 3
num_queries = 16  # Q
section_size = 32  # K
code_dim = 16  # d
causal_queries = 1  # 0: each query of the Q-Former also sees those after it
batch_size = 32
lr = 2e-3
tokenizer_steps = 1600
continuous_steps = 400  # the first of them, before there are codes
lm_steps = 1200
restart_every = 25  # steps between restarts of unused codes; 0: never
pixel_weight = 5.0
code_weight = 0.1
caption_weight = 1.0
prefix_share = 0.25  # share of a batch that is decoded from its first codes only
eval_scenes = 200

for argument in sys.argv[1:]:
    name, _, value = argument.partition("=")
    if type(globals().get(name)) not in (int, float, str):
        sys.exit(f"{argument}: not NAME=VALUE with a setting of microseed.py")
    globals()[name] = type(globals()[name])(value)

torch.manual_seed(seed)
start_time = time.time()


def log(text):
    print(f"{time.time() - start_time:5.0f} s  {text}", flush=True)


# ---- 1. The data: one or two of 20 drawn things on one of six backgrounds

THINGS = (
    "fox penguin frog whale octopus crab butterfly sunflower cactus mushroom watermelon banana "
    "strawberry carrot donut bus rocket snowman umbrella star"
).split()
BACKGROUNDS = "white pink khaki turquoise plum navy".split()  # names that CSS and pillow know
# Each thing's centre (x, y) and longer side, as shares of the image.
LAYOUTS = {
    "large": [(0.5, 0.5, 0.84)],
    "left of": [(0.25, 0.5, 0.44), (0.75, 0.5, 0.44)],
    "above": [(0.5, 0.25, 0.44), (0.5, 0.75, 0.44)],
}
if not Path(sprites).exists():
    sys.exit(f"{sprites} is missing: run microseed.py in the root of the repository")
drawings = {}
with tarfile.open(sprites) as archive:
    for thing in THINGS:
        data = archive.extractfile(f"noto-{thing}.webp").read()
        drawings[thing] = Image.open(io.BytesIO(data)).convert("RGBA")


def render(scene):
    """A scene (background, layout, things) -> uint8 [image_size, image_size, 3]."""
    background, layout, things = scene
    side = 4 * image_size  # four times too large, then reduced: smooth edges
    canvas = Image.new("RGB", (side, side), background)
    for thing, (x, y, share) in zip(things, LAYOUTS[layout], strict=True):
        drawing = drawings[thing]
        scale = share * side / max(drawing.size)
        sprite = drawing.resize([round(edge * scale) for edge in drawing.size])
        corner = round(x * side - sprite.width / 2), round(y * side - sprite.height / 2)
        canvas.paste(sprite, corner, mask=sprite)
    return np.asarray(canvas.reduce(4))


def caption_of(scene):
    """For example "a fox left of an octopus on a pink background": all that the image shows."""
    background, layout, things = scene
    names = [("an " if thing[0] in "aeiou" else "a ") + thing for thing in things]
    subject = f"a large {things[0]}" if layout == "large" else f" {layout} ".join(names)
    return f"{subject} on a {background} background"


# All 4,680 scenes. Every tenth ordered pair of things is kept out of all training, so that the test
# asks whether the model can compose: it knows foxes and cacti, but never a fox left of a cactus.
pairs = list(itertools.permutations(THINGS, 2))
unseen_pairs = set(pairs[7::10])
arrangements = [("large", (thing,)) for thing in THINGS]
arrangements += [(layout, pair) for layout in ("left of", "above") for pair in pairs]
scenes = [(background, *arrangement) for background in BACKGROUNDS for arrangement in arrangements]
captions = [caption_of(scene) for scene in scenes]

is_unseen = torch.tensor([things in unseen_pairs for _, _, things in scenes])
train_scenes = (~is_unseen).nonzero().flatten()
test_scenes = is_unseen.nonzero().flatten()

pixels = torch.tensor(np.stack([render(scene) for scene in scenes]))
images = pixels.permute(0, 3, 1, 2) / 127.5 - 1  # [scenes, 3, image_size, image_size] in -1 .. 1

# One vocabulary for words and codes, in the order of SEED-LLaMA: words, codes, <img>, </img>.
vocabulary = ["<pad>", "<s>", "</s>", *sorted(set(" ".join(captions).split()))]
PAD, BOS, EOS = 0, 1, 2
num_codes = num_queries * section_size
CODE_START = len(vocabulary)
BOI = CODE_START + num_codes
EOI = BOI + 1
vocabulary_size = EOI + 1


def word_ids(text):
    return [vocabulary.index(word) for word in text.split()]


def pad(sequences):
    """Lists of ids -> [B, T], short ones filled up with PAD."""
    length = max(map(len, sequences))
    return torch.tensor([ids + [PAD] * (length - len(ids)) for ids in sequences])


log(f"{len(scenes)} scenes, {len(test_scenes)} of them never trained on; {vocabulary_size} ids")
log(f"bits: {24 * image_size**2} of pixels, {num_queries * math.log2(section_size):.0f} of codes")


# ---- 2. Layers: three kinds of transformer need one attention and one MLP


class Attention(nn.Module):
    """Multi-head attention of x [B, T, D] to `source` [B, S, D], by default to x itself."""

    def __init__(self, bias=True):
        super().__init__()
        self.query = nn.Linear(width, width, bias)
        self.key = nn.Linear(width, width, bias=False)  # a bias would cancel in the softmax
        self.value = nn.Linear(width, width, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x, source=None, causal=False, rotary=None):
        source = x if source is None else source
        q, k, v = [
            features.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, T, D / heads]
            for features in (self.query(x), self.key(source), self.value(source))
        ]
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(attended.transpose(1, 2).flatten(2))


def mlp(*widths, activation=nn.GELU, bias=True):
    """Linear layers between these widths, with an activation after each but the last."""
    layers = []
    for in_width, out_width in itertools.pairwise(widths):
        layers += [nn.Linear(in_width, out_width, bias), activation()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """A layer of a ViT. Pre-norm: each part reads a normalised x and adds to the plain one."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention, self.mlp = Attention(), mlp(width, 4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images [B, 3, H, W] -> features [B, 1 + N, D]: a class token, then one for each patch."""

    def __init__(self):
        super().__init__()
        N = (image_size // patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position_embed = nn.Parameter(0.5 * torch.randn(1, 1 + N, width))
        self.blocks = nn.Sequential(*[Block() for _ in range(vit_depth)])

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        class_tokens = self.class_token.expand(len(images), -1, -1)
        return self.blocks(torch.cat([class_tokens, patches], dim=1) + self.position_embed)


class QFormerLayer(nn.Module):
    """A layer of BERT with cross-attention. Post-norm: each sum is normalised."""

    def __init__(self):
        super().__init__()
        self.self_attention, self.cross_attention = Attention(), Attention()
        self.mlp = mlp(width, 4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-12) for _ in range(3))

    def forward(self, x, source):
        x = self.norm1(x + self.self_attention(x, causal=bool(causal_queries)))
        x = self.norm2(x + self.cross_attention(x, source))
        return self.norm3(x + self.mlp(x))


class QFormer(nn.Module):
    """Learned queries that read an image: however many patches it has, it becomes Q vectors.

    SEED's change to BLIP-2's Q-Former is the causal mask: query i sees only the queries before it.
    So code i does not depend on later codes, and a language model can predict them in order.
    """

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, num_queries, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(QFormerLayer() for _ in range(qformer_depth))

    def forward(self, image_features):
        x = self.norm(self.queries.expand(len(image_features), -1, -1))
        for layer in self.layers:
            x = layer(x, image_features)
        return x


# ---- 3. The tokenizer: image -> codes -> image


class Codebook(nn.Module):
    """Vector quantisation: replaces a vector by the nearest entry of a codebook.

    Each of the Q positions has a section of K entries of its own (SEED's positions share one
    codebook of 8,192; sections are an option of the library). Code c is row c of `embedding`.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_codes, code_dim) / section_size)
        self.register_buffer("usage", torch.zeros(num_codes), persistent=False)

    def nearest(self, z):
        """Vectors [B, Q, d] -> codes [B, Q] in 0 .. Q K - 1."""
        sections = self.embedding.view(num_queries, section_size, code_dim)
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all entries.
        distances = sections.square().sum(-1) - 2 * torch.einsum("bqd,qkd->bqk", z, sections)
        return distances.argmin(-1) + section_size * torch.arange(num_queries)

    def forward(self, z):
        """Vectors [B, Q, d] -> entries [B, Q, d] and the loss that keeps both together."""
        codes = self.nearest(z.detach())
        self.usage += torch.bincount(codes.flatten(), minlength=num_codes)
        entries = self.embedding[codes]
        commitment_loss = F.mse_loss(z, entries.detach())  # moves vectors to their entries
        codebook_loss = F.mse_loss(entries, z.detach())  # moves entries to their vectors
        # "Nearest" has no gradient. Straight-through estimator: forward, this is the entry;
        # backward, the gradient passes to z as if nothing had been replaced.
        quantized = z + (entries - z).detach()
        return quantized, commitment_loss + 0.25 * codebook_loss

    @torch.no_grad()
    def restart_unused(self, z):
        """Move entries that were not used since the last restart onto random vectors [B, Q, d]."""
        for code in (self.usage == 0).nonzero().flatten().tolist():
            self.embedding[code] = z[torch.randint(len(z), ()), code // section_size]
        self.usage.zero_()


class Tokenizer(nn.Module):
    """SEED-2's tokenizer. Its decoder turns all codes into one embedding of the image: in SEED the
    one from which Stable Diffusion (unCLIP) draws, here simply all pixels."""

    def __init__(self):
        super().__init__()
        # image -> codes
        self.vit = ViT()
        self.vit_norm = nn.LayerNorm(width)
        self.qformer = QFormer()
        self.encode_task = mlp(width, width, code_dim, activation=nn.Tanh)
        self.codebook = Codebook()
        # codes -> image
        self.decode_task = mlp(code_dim, code_dim, width, activation=nn.Tanh)
        self.position_embed = nn.Parameter(0.5 * torch.randn(1, num_queries, width))
        self.blocks = nn.Sequential(*[Block() for _ in range(decoder_depth)])
        self.reduce = mlp(width, 256, 128, 32, activation=nn.ReLU, bias=False)
        self.to_pixels = nn.Linear(num_queries * 32, 3 * image_size**2)
        # Preserve the size of what passes, so that codes make a difference from the first step on.
        for layer in (*self.encode_task, *self.decode_task, *self.reduce):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def query_features(self, images):
        """Images [B, 3, H, W] -> outputs of the Q-Former [B, Q, D]."""
        return self.qformer(self.vit_norm(self.vit(images)))

    def code_features(self, entries):
        """Entries of the codebook [B, Q, d] -> what all of them say about the image [B, 32 Q]."""
        x = self.decode_task(entries) + self.position_embed
        return self.reduce(self.blocks(x)).flatten(1)

    def draw_pixels(self, code_features):
        return self.to_pixels(code_features).view(-1, 3, image_size, image_size)

    @torch.no_grad()
    def encode(self, images):
        """Images [B, 3, H, W] -> codes [B, Q]."""
        z = [self.encode_task(self.query_features(chunk)) for chunk in images.split(100)]
        return self.codebook.nearest(torch.cat(z))

    @torch.no_grad()
    def decode(self, codes, length=num_queries):
        """The first `length` of codes [B, Q] -> images [B, 3, H, W]; codes of -1 are left out."""
        is_kept = (codes >= 0) & (torch.arange(num_queries) < length)
        entries = self.codebook.embedding[codes] * is_kept[..., None]
        return self.draw_pixels(self.code_features(entries))


# ---- 4. Training the tokenizer


def optimizer_of(*models):
    parameters = nn.ModuleList(models).parameters()
    return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.01)


def update(optimizer, loss, step, total_steps, **logged):
    """One step. The learning rate rises for 50 steps, then falls to zero on a cosine."""
    group = optimizer.param_groups[0]
    group["lr"] = lr * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / total_steps)) / 2
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    if step % 100 == 0 or step == total_steps - 1:
        log(f"step {step:4d}  " + "  ".join(f"{k} {v:.4f}" for k, v in logged.items()))


# Codes should mean what words mean, but pixels alone teach colours and places long before things.
# So one linear layer must read the caption, all words at once, in the outputs of the Q-Former, and
# another one in what the codes say. (SEED compares the outputs with captions by a contrastive loss,
# which needs large batches; for 40 words, naming them does the same.)
caption_targets = pad([[*word_ids(caption), EOS] for caption in captions])
caption_length = caption_targets.shape[1]
query_head = nn.Linear(num_queries * width, caption_length * CODE_START)
code_head = nn.Linear(num_queries * 32, caption_length * CODE_START)


def caption_loss(head, features, batch):
    """Features [B, F] and indices [B] of their scenes -> cross-entropy of the words."""
    logits = head(features).view(-1, CODE_START)
    return F.cross_entropy(logits, caption_targets[batch].flatten(), ignore_index=PAD)


tokenizer = Tokenizer()
codebook = tokenizer.codebook
optimizer = optimizer_of(tokenizer, query_head, code_head)
for step in range(tokenizer_steps):
    batch = train_scenes[torch.randint(len(train_scenes), (batch_size,))]
    query_features = tokenizer.query_features(images[batch])
    z = tokenizer.encode_task(query_features)

    # 1. Codes. At first vectors pass unchanged, until they say something that is worth a code. Then
    #    the codebook begins on vectors of 512 images. Entries that nothing uses get other vectors,
    #    except in the last fifth of the training.
    if step == continuous_steps:
        sample = train_scenes[torch.randperm(len(train_scenes))[:512]]
        codebook.restart_unused(tokenizer.encode_task(tokenizer.query_features(images[sample])))
    elif restart_every and step % restart_every == 0 and step < 0.8 * tokenizer_steps:
        codebook.restart_unused(z)
    entries, code_loss = codebook(z) if step >= continuous_steps else (z, torch.zeros(()))

    # 2. A share of the batch is decoded from its first codes only. These must then be enough for a
    #    rough image, so what matters most comes first.
    lengths = torch.randint(1, num_queries + 1, (batch_size,))
    lengths[round(prefix_share * batch_size) :] = num_queries
    is_kept = torch.arange(num_queries) < lengths[:, None]  # [B, Q]
    code_features = tokenizer.code_features(entries * is_kept[..., None])
    reconstruction = tokenizer.draw_pixels(code_features)

    # 3. Losses. Pixels: 1.1, soon 0.1, a jump when codes begin, 0.02 at the end; stuck near 0.1,
    #    codes know colours and places only. Codes: up to 2, then a long fall; near 0 while pixels
    #    stay, all images have the same codes. Captions: from ln 37 = 3.6 to 0 in the queries, to
    #    0.05 in the codes, since some images have few of them.
    losses = {
        "pixels": F.mse_loss(reconstruction, images[batch]),
        "codes": code_loss,
        "captions_in_queries": caption_loss(query_head, query_features.flatten(1), batch),
        "captions_in_codes": caption_loss(code_head, code_features, batch),
    }
    loss = pixel_weight * losses["pixels"] + code_weight * losses["codes"]
    loss = loss + caption_weight * (losses["captions_in_queries"] + losses["captions_in_codes"])
    update(optimizer, loss, step, tokenizer_steps, **losses)

codes = tokenizer.encode(images)  # [scenes, Q]
codes_used = len(codes.unique())
log(f"{codes_used} of {num_codes} codes are used")


# ---- 5. The language model: LLaMA


def rotary(x):
    """Rotary position embedding of x [B, heads, T, d]: pairs of numbers turn by an angle that grows
    with the position, so that the product of a query and a key depends on their distance."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * frequencies  # [T, d / 2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class LlamaLayer(nn.Module):
    """Pre-norm as in a ViT; causal attention with rotary positions, and a gated MLP (SwiGLU)."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.attention = Attention(bias=False)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm1(x), causal=True, rotary=rotary)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary_size, width)
        self.layers = nn.Sequential(*[LlamaLayer() for _ in range(lm_depth)])
        self.norm = nn.RMSNorm(width, eps=1e-6)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)

    def forward(self, ids):
        """Ids [B, T] -> logits of the next id [B, T, V]; one table embeds and predicts tokens."""
        x = self.layers(self.embed_tokens(ids))
        return self.norm(x) @ self.embed_tokens.weight.T

    @torch.no_grad()
    def generate(self, ids, new_tokens):
        """Ids [B, T] -> the most probable continuation [B, new_tokens]."""
        for _ in range(new_tokens):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], dim=1)
        return ids[:, -new_tokens:]


# ---- 6. Training the language model: half of the sequences describe, half of them draw


def image_ids(codes):
    """Codes [Q] -> <img> codes </img> as ids."""
    return [BOI, *(CODE_START + codes).tolist(), EOI]


lm = Llama()
optimizer = optimizer_of(lm)
for step in range(lm_steps):
    sequences = []
    for row, scene in enumerate(train_scenes[torch.randint(len(train_scenes), (batch_size,))]):
        image, text = image_ids(codes[scene]), word_ids(captions[scene])
        body = image + text if row % 2 == 0 else text + image
        sequences.append([BOS, *body, EOS])
    ids = pad(sequences)
    logits = lm(ids[:, :-1]).flatten(0, 1)
    # From ln V = 6.3 down to about 0.4, never to 0: which scene comes, and whether its image or its
    # caption is first, cannot be known. That is ln(4,224) + ln 2 = 9 nats in about 28 ids.
    loss = F.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=PAD)
    update(optimizer, loss, step, lm_steps, language_model=loss)


# ---- 7. Evaluation: on pairs of things that were seen in training, and on pairs that were not


def describe(codes):
    """Codes [B, Q] -> captions; a code among the words is written as "?"."""
    prompts = torch.tensor([[BOS, *image_ids(row)] for row in codes])
    texts = []
    for ids in lm.generate(prompts, caption_length).tolist():
        words = ids[: ids.index(EOS)] if EOS in ids else ids
        texts.append(" ".join(vocabulary[i] if i < CODE_START else "?" for i in words))
    return texts


def draw(texts):
    """Captions -> codes [B, Q]; all codes are -1 where the answer is not a well-formed image."""
    codes = torch.full((len(texts), num_queries), -1)
    for row, text in enumerate(texts):
        prompt = torch.tensor([[BOS, *word_ids(text), BOI]])
        answer = lm.generate(prompt, num_queries + 1)[0]
        image = answer[:-1] - CODE_START
        if answer[-1] == EOI and image.min() >= 0 and image.max() < num_codes:
            codes[row] = image
    return codes


def recognise(codes, length=num_queries):
    """Codes [B, Q] -> for each the caption of the scene whose image is nearest to the decoded one:
    a judge that needs no network and cannot be fooled by one."""
    decoded = tokenizer.decode(codes, length)
    distances = torch.cdist(decoded.flatten(1), images.flatten(1))
    return [captions[scene] for scene in distances.argmin(1)]


def accuracy(answers, truths):
    return sum(answer == truth for answer, truth in zip(answers, truths, strict=True)) / len(truths)


PREFIXES = [length for length in (1, 2, 4, 8) if length < num_queries] + [num_queries]
results = {"seed": seed, "codes_used": codes_used}
for split, split_scenes in (("seen", train_scenes), ("unseen", test_scenes)):
    sample = split_scenes[torch.randperm(len(split_scenes))[:eval_scenes]]
    truths = [captions[scene] for scene in sample]
    described = accuracy(describe(codes[sample]), truths)
    drawn = accuracy(recognise(draw(truths)), truths)
    reconstructed = {n: accuracy(recognise(codes[sample], n), truths) for n in PREFIXES}
    results[split] = {"described": described, "drawn": drawn, "reconstructed": reconstructed}
    log(f"{split} pairs: {results[split]}")


# ---- 8. The picture: what the codes hold, and what the language model makes of them


def to_cell(image):
    """Image [3, H, W] in -1 .. 1 -> PIL image of 128 pixels."""
    array = ((image.permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).byte().numpy()
    return Image.fromarray(array).resize((128, 128), Image.Resampling.NEAREST)


def codes_cell(codes):
    """Codes [Q] -> squares in reading order; the hue is the code's number in its section."""
    rows = F.pad(codes, (0, -num_queries % 4)).view(-1, 4) % section_size
    hue = (256 * rows // section_size).byte().numpy()
    saturation, value = np.full_like(hue, 190), np.full_like(hue, 235)
    bands = [Image.fromarray(band) for band in (hue, saturation, value)]
    return Image.merge("HSV", bands).convert("RGB").resize((128, 128), Image.Resampling.NEAREST)


shown = test_scenes[torch.randperm(len(test_scenes))[:6]]
texts = [captions[scene] for scene in shown]
described, drawn = describe(codes[shown]), draw(texts)
titles = ["scene", "codes", *(f"{n} codes" for n in PREFIXES), "drawn from words", "codes"]
sheet = Image.new("RGB", (8 + 136 * len(titles), 24 + 164 * len(texts)), "white")
pen = ImageDraw.Draw(sheet)
for column, title in enumerate(titles):
    pen.text((8 + 136 * column, 6), title, "black")
for row, scene in enumerate(shown.tolist()):
    cells = [to_cell(images[scene]), codes_cell(codes[scene])]
    cells += [to_cell(tokenizer.decode(codes[scene : scene + 1], n)[0]) for n in PREFIXES]
    cells += [to_cell(tokenizer.decode(drawn[row : row + 1])[0]), codes_cell(drawn[row])]
    top = 24 + 164 * row
    for column, cell in enumerate(cells):
        sheet.paste(cell, (8 + 136 * column, top))
    pen.text((8, top + 130), f"to draw:    {texts[row]}", "black")
    pen.text((8, top + 144), f"described:  {described[row]}", "black")

folder = Path(out)
folder.mkdir(parents=True, exist_ok=True)
sheet.save(folder / "picture.png")
torch.save({"tokenizer": tokenizer.state_dict(), "lm": lm.state_dict()}, folder / "weights.pt")
results["seconds"] = round(time.time() - start_time)
(folder / "results.json").write_text(json.dumps(results, indent=1))
log(f"wrote picture.png, weights.pt and results.json to {folder}")
