"""Samples, completion, swapped decoders and the files that `tools/infer.py` writes."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from core.checkpoint import save_atomic
from core.engine.commands.inference import infer
from core.errors import ConfigError
from seqgan.data.codes import CodeCache
from seqgan.inference.files import SampleRequest, hidden_pixels, read_request, square, tokenizer_of
from seqgan.inference.generation import Generator, code_mask, spread_labels
from seqgan.inference.pictures import code_colours, from_pixels, grid, to_pixels
from seqgan.inference.sampling import ARSampler, ParallelSampler
from seqgan.models import ARTransformer, MaskedTransformer, conv_tokenizer, second_phase
from seqgan.trainer import TokenizerTrainer, TransformerTrainer
from tools.infer import Options

SIZES = {"length": 16, "dim": 8, "depth": 1, "num_heads": 1}
TOKENIZER = {"filters": 32, "multipliers": [1, 2], "num_res_blocks": 1, "codebook_size": 16, "z_dim": 8}


def tokenizer():
    torch.manual_seed(0)
    made = conv_tokenizer(**TOKENIZER)
    torch.nn.init.normal_(made.quantizer.embedding.weight)
    return made.eval()


def transformer(kind: str, classes: int = 3):
    torch.manual_seed(1)
    made = (ARTransformer if kind == "ar" else MaskedTransformer)(16, classes, **SIZES)
    torch.nn.init.normal_(made.tokens.weight)
    return made.eval()


def trainer(kind: str, **options) -> TransformerTrainer:
    sampler = ARSampler() if kind == "ar" else ParallelSampler(4)
    return TransformerTrainer(transformer(kind), tokenizer(), sampler=sampler, **options).eval()


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_samples_do_not_depend_on_the_batches(kind: str) -> None:
    made = trainer(kind).generator()
    labels = [0, 1, 2, 2, 1]
    whole = made.sample(labels, seed=3)
    assert whole.shape == (5, 8, 8, 3) and whole.dtype == np.uint8
    parts = made.sample(labels, seed=3, batch=2)
    # Products of matrices of other sizes are rounded otherwise: a level of 255 at most.
    assert np.abs(whole.astype(int) - parts).max() <= 1
    rest = made.sample(labels[3:], seed=3, first=3)
    assert np.abs(whole[3:].astype(int) - rest).max() <= 1
    assert len({image.tobytes() for image in made.sample([1] * 4, seed=3)}) > 1
    assert not np.array_equal(made.sample(labels, seed=4), whole)
    codes = torch.cat(list(made.codes(labels, seed=3, batch=2)))
    assert np.array_equal(to_pixels(made.tokenizer.decode(codes)), parts)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_unconditional_models_need_no_labels(kind: str) -> None:
    sampler = ARSampler() if kind == "ar" else ParallelSampler(2)
    model = TransformerTrainer(
        transformer(kind, 1), tokenizer(), sampler=sampler, request=SampleRequest(count=5, batch=2)
    )
    found = model.eval().generate()
    assert found.record["labels"] == [0] * 5
    images = found.arrays["5x8x8x3"]["arr_0"]
    assert images.shape == (5, 8, 8, 3) and len({image.tobytes() for image in images}) > 1


def test_labels_are_spread_and_checked() -> None:
    assert spread_labels(4, 8) == [0, 2, 4, 6] and spread_labels(5, 2) == [0, 1, 0, 1, 0]
    assert SampleRequest(labels=[7, 9], count=3).classes(10) == [7, 9, 7]
    assert len(SampleRequest().classes(10)) == 16 and SampleRequest(labels=[3]).classes(10) == [3]
    with pytest.raises(ConfigError, match="label 3: the transformer knows classes 0 to 2"):
        trainer("ar").generator().sample([0, 3])
    with pytest.raises(ConfigError, match="no image"):
        trainer("ar").generator().sample([])


def test_requests_are_read_from_files(tmp_path) -> None:
    base = SampleRequest(seed=5, count=9)
    (tmp_path / "a.txt").write_text("1\n2 0\n")
    assert read_request(tmp_path / "a.txt", base) == SampleRequest(seed=5, labels=[1, 2, 0])
    (tmp_path / "b.json").write_text('{"count": 4, "seed": 1}')
    assert read_request(tmp_path / "b.json", base) == SampleRequest(count=4, seed=1)
    (tmp_path / "c.json").write_text('{"cuont": 4}')
    with pytest.raises(ConfigError, match=r"'cuont'.*count"):
        read_request(tmp_path / "c.json", base)
    (tmp_path / "d.txt").write_text("cat")
    with pytest.raises(ConfigError, match="neither labels"):
        read_request(tmp_path / "d.txt", base)
    (tmp_path / "e.json").write_text('{"labels": []}')
    with pytest.raises(ConfigError, match=r"e\.json: request\.labels=\[\] asks for no image"):
        read_request(tmp_path / "e.json", base)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("labels", [[], "12", 3, [1.5], ["a"], [True], [[1]]]),
        ("count", [0, -1, 2.0, "4", True]),
        ("seed", [-1, 0.5, None]),
        ("batch", [0, None, "all"]),
        ("first", [-1, None]),
        ("singles", ["no", 1]),
        ("paste", [None, "yes"]),
        ("tokenizer", [3]),
    ],
)
def test_fields_of_a_request_are_checked(field: str, wrong: list) -> None:
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"request\.{field}="):
            SampleRequest(**{field: value})


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_completion_keeps_what_is_known(kind: str, photo) -> None:
    made = trainer(kind).generator()
    image = square(photo, 8)
    hidden = hidden_pixels([0.5, 0.25, 1.0, 0.75], 8)
    assert hidden.sum() == 4 * 4 and not hidden[:4].any() and not hidden[:, :2].any()
    pictures = made.complete(image, hidden, [0, 1, 2], seed=0)
    own = to_pixels(image[None])[0]
    assert all(np.array_equal(p[~hidden.numpy()], own[~hidden.numpy()]) for p in pictures)
    assert len({p.tobytes() for p in pictures}) > 1
    codes = made.tokenizer.encode(image[None]).flatten(1)
    known = ~code_mask(hidden, (4, 4)).reshape(1, -1)
    assert known.sum() == 12
    drawn = next(made.codes([0, 1], given=codes.expand(2, -1), known=known.expand(2, -1)))
    assert torch.equal(drawn[:, known[0]], codes.expand(2, -1)[:, known[0]])
    plain = made.complete(image, hidden, [0, 1], seed=0, paste=False)
    assert np.array_equal(plain, to_pixels(made.tokenizer.decode(drawn)))


def test_every_image_keeps_its_own_codes_in_any_batch() -> None:
    given = torch.arange(3)[:, None].expand(3, 16)
    known = torch.arange(16).expand(3, 16) < 5
    drawn = torch.cat(list(trainer("nar").generator().codes([0, 1, 2], batch=1, given=given, known=known)))
    assert torch.equal(drawn[known], given[known])


def test_a_code_of_one_hidden_pixel_is_drawn_anew() -> None:
    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[3, 5] = True
    assert code_mask(hidden, (4, 4)).nonzero().tolist() == [[1, 2]]


def test_masks_come_from_words_shares_and_files(tmp_path) -> None:
    assert hidden_pixels("upper", 8)[4:].all() and not hidden_pixels("upper", 8)[:4].any()
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 6:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert torch.equal(hidden_pixels(str(tmp_path / "mask.png"), 8), torch.from_numpy(mask > 0))
    for wrong, says in (("left", "neither 'upper'"), ([0.5, 0, 0.2, 1], "four shares")):
        with pytest.raises(ConfigError, match=says):
            hidden_pixels(wrong, 8)
    Image.fromarray(mask * 0).save(tmp_path / "black.png")
    with pytest.raises(ConfigError, match="nothing is left"):
        hidden_pixels(str(tmp_path / "black.png"), 8)


def test_decoders_of_both_phases_go_with_one_transformer() -> None:
    made = trainer("nar").generator()
    other = second_phase(copy.deepcopy(made.tokenizer))
    assert np.array_equal(made.with_decoder(other).sample([0, 1]), made.sample([0, 1]))
    other.decoder.conv_out.bias.data += 0.3
    assert not np.array_equal(made.with_decoder(other).sample([0, 1]), made.sample([0, 1]))
    other.encoder.stem.weight.data += 1e-3
    with pytest.raises(ConfigError, match="first phase"):
        made.with_decoder(other)
    with pytest.raises(ConfigError, match="codebook of 16 codes"):
        Generator(tokenizer(), ARTransformer(8, 1, **SIZES))
    with pytest.raises(ConfigError, match="does not draw"):
        Generator(tokenizer(), transformer("ar"), ParallelSampler())


class Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.full((3, 8, 8), float(index)), "label": index}


def test_a_transformer_remembers_whose_codes_it_learnt(tmp_path) -> None:
    model = trainer("ar", cache=CodeCache(tmp_path / "codes"))
    assert not model.learnt_codes.any()
    model.training_data(Pictures())
    again = trainer("ar")
    again.load_state_dict(model.state_dict())
    again.generate()
    again.tokenizer.quantizer.embedding.weight.data[0] += 1e-3
    with pytest.raises(ConfigError, match="trained on codes of the tokenizer"):
        again.generate()
    with pytest.raises(ConfigError, match="trained on codes of the tokenizer"):
        again.training_data(Pictures())
    with pytest.raises(ConfigError, match=r"give model\.tokenizer"):
        TransformerTrainer(transformer("ar")).generate()


def test_the_tokenizer_of_a_run_is_rebuilt(tmp_path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config = {"model": {"type": "seqgan.TokenizerTrainer", "network": {"type": "seqgan.conv_tokenizer", **TOKENIZER}}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    own = TokenizerTrainer(tokenizer())
    file = tmp_path / "run" / "checkpoints" / "weights.pt"
    save_atomic({"model": own.state_dict()}, file)
    found = tokenizer_of(file)
    assert found.fingerprint() == own.network.fingerprint()
    assert torch.equal(found.decoder.conv_out.weight, own.network.decoder.conv_out.weight)
    model = trainer("nar", request=SampleRequest(count=2, tokenizer=str(file)))
    assert model.generate().record["labels"] == [0, 1]
    with pytest.raises(ConfigError, match="no checkpoint"):
        tokenizer_of(tmp_path / "nothing")


EXPERIMENT = """# @package _global_
# A tiny transformer
name: mine/tiny
model:
  type: seqgan.TransformerTrainer
  network:
    {type: seqgan.MaskedTransformer, codebook_size: 16, num_classes: 3, length: 16, dim: 8, depth: 1, num_heads: 1}
  tokenizer:
    {type: seqgan.conv_tokenizer, filters: 32, multipliers: [1, 2], num_res_blocks: 1, codebook_size: 16, z_dim: 8}
  sampler: {type: seqgan.ParallelSampler, steps: 3}
  request: {type: seqgan.SampleRequest, count: 5, keep: null, labels: null}
"""


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "configs" / "experiment" / "mine"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(EXPERIMENT)
    save_atomic(trainer("nar").state_dict(), tmp_path / "weights.pt")
    return Options(
        checkpoint=str(tmp_path / "weights.pt"),
        output=str(tmp_path / "out"),
        device="cpu",
        config_dir=str(tmp_path / "configs"),
    )


def test_the_tool_writes_grids_pictures_and_adm_batches(site, tmp_path) -> None:
    (record,) = infer(["experiment=mine/tiny"], site)
    out = tmp_path / "out"
    with np.load(out / "samples_5x8x8x3.npz") as batch:
        assert batch["arr_0"].shape == (5, 8, 8, 3) and batch["arr_0"].dtype == np.uint8
        assert batch["arr_1"].tolist() == [0, 1, 2, 0, 1] == record["labels"]
        assert np.array_equal(np.asarray(Image.open(out / "samples_0004.png")), batch["arr_0"][4])
    assert np.asarray(Image.open(out / "samples_grid.png")).shape == (2 * 8 + 2, 3 * 8 + 4, 3)
    assert json.loads((out / "results.json").read_text())[0]["sampler"]["steps"] == 3
    (tmp_path / "two.txt").write_text("2 2")
    (record,) = infer(["experiment=mine/tiny"], dataclasses.replace(site, input=str(tmp_path / "two.txt")))
    assert record["labels"] == [2, 2]


def test_the_tool_completes_pictures(site, tmp_path, photo) -> None:
    asked = ["experiment=mine/tiny", "model.request.labels=[1,2]", "model.request.count=2"]
    (record,) = infer([*asked, "model.request.keep=[0,0,1,0.5]"], dataclasses.replace(site, input=str(photo)))
    assert record["labels"] == [1, 2] and record["hidden_pixels"] == 0.5
    single = np.asarray(Image.open(tmp_path / "out" / "photo_completed_0001.png"))
    assert np.array_equal(single[:, 4:], to_pixels(square(photo, 8)[None])[0][:, 4:])


def test_predictions_of_a_picture(photo) -> None:
    model = trainer("ar")
    with pytest.raises(ConfigError, match="picture's class"):
        model.infer(photo)
    model.request = SampleRequest(labels=[2])
    found = model.infer(photo)
    codes = model.tokenizer.encode(square(photo, 8)[None])
    nll = model.predict({"codes": codes, "label": torch.tensor([2]), "sample_id": ["a"]})["nll"]
    assert found.record["bits_per_code"] == pytest.approx(nll.mean().item() / np.log(2), abs=1e-3)
    assert found.record["bits_per_pixel"] == pytest.approx(found.record["bits_per_code"] * 16 / 64, abs=1e-3)
    assert found.pictures["predicted"].shape == (8, 3 * 8 + 4, 3) and found.record["codes"] == codes[0].tolist()


def test_media_show_samples_and_predictions() -> None:
    batch = {"image": torch.rand(2, 3, 8, 8) * 2 - 1, "label": torch.tensor([0, 2]), "sample_id": ["a", "b"]}
    shown = trainer("ar").media(batch)
    assert shown["samples"].shape == (8, 18, 3) and shown["predictions"].shape == (18, 28, 3)
    assert trainer("nar").media(batch).keys() == {"samples"}
    assert TokenizerTrainer(tokenizer()).media(batch)["reconstructions"].shape == (18, 28, 3)


def test_a_picture_is_reconstructed_at_its_own_or_the_trained_size(photo, tmp_path) -> None:
    wide = np.random.default_rng(1).integers(0, 256, (20, 35, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    model = TokenizerTrainer(tokenizer()).eval()
    found = model.infer(tmp_path / "wide.png")
    assert found.record["size"] == [16, 32] and found.pictures["reconstruction"].shape == (16, 3 * 32 + 4, 3)
    assert np.array_equal(found.pictures["reconstruction"][:, :32], wide[:16, :32])
    image = from_pixels(wide[None, :16, :32])
    made = model.network(image).reconstruction.clamp(-1, 1)
    expected = 10 * torch.log10(4 / (made - image).square().mean())
    assert found.record["psnr"] == pytest.approx(expected.item(), abs=1e-3)
    assert np.array(found.record["codes"]).shape == (8, 16)
    model.input_shape = (3, 8, 8)
    assert model.infer(photo).record["size"] == [8, 8]
    with pytest.raises(ValueError, match="at least 16 x 16"):
        TokenizerTrainer(tokenizer()).eval().infer(photo)


def test_near_codes_have_near_colours() -> None:
    codebook = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 1.0], [5.0, -1.0]])
    colours = code_colours(codebook)
    assert colours.shape == (4, 3) and colours.min() >= 0 and colours.max() <= 1
    assert (colours[0] - colours[1]).norm() < 0.1 < (colours[0] - colours[2]).norm()


def test_a_grid_leaves_gaps_and_reads_by_rows() -> None:
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (1, 2, 3)])
    sheet = grid(images)
    assert sheet.shape == (6, 8, 3)
    assert sheet[0, 0, 0] == 1 and sheet[0, 5, 0] == 2 and sheet[4, 0, 0] == 3 and sheet[2, 0, 0] == 255
