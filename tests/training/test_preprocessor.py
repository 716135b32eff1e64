"""preprocessor_config.json and the weights beside it: absent, right, damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deeplimit.errors import InputError
from deeplimit.training import load_model
from deeplimit.training.library_models import PREPROCESSOR, standardisation_beside

hf = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
GOOD = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5], "size": {"height": 8}}
DAMAGED = {
    "cut": ('{"image_mean": [0.5', "damaged"),
    "a list": ("[1, 2]", r"holds \[1, 2\]; expected an object"),
    "misspelt": (GOOD | {"image_men": [0.5]}, "unknown field image_men, did you mean image_mean"),
    "missing": ({"image_mean": [0.5] * 3}, "no image_std among image_mean; expected 3 numbers"),
    "empty": ({}, "no image_mean among no fields"),
    "std of 0": (GOOD | {"image_std": [0.2, 0, 0.2]}, "image_std is 0; expected a number above 0"),
    "not a number": ('{"image_mean": NaN, "image_std": 1}', "NaN is not a finite number"),
    "words": (GOOD | {"image_mean": ["0.5"] * 3}, 'image_mean is "0.5"; expected finite numbers'),
    "too few": (GOOD | {"image_std": [0.2]}, "image_std has 1 numbers, .* 3 channels"),
    "no flag": (GOOD | {"do_normalize": "no"}, "do_normalize is 'no'; expected true or false"),
    "scaled by 0": (GOOD | {"rescale_factor": 0}, "rescale_factor is 0; expected a number above 0"),
    "moved": (GOOD | {"rescale_offset": True}, "rescale_offset is true, which is not known"),
}


def beside(folder: Path, said: object) -> None:
    text = said if isinstance(said, str) else json.dumps(said)
    (folder / PREPROCESSOR).write_text(text)


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_an_error(case: str, tmp_path: Path) -> None:
    said, message = DAMAGED[case]
    beside(tmp_path, said)
    with pytest.raises(InputError, match=message) as caught:
        standardisation_beside(tmp_path, 3)
    assert str(tmp_path / PREPROCESSOR) in str(caught.value)
    assert "give --mean and --std" in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_resize": True, "image_mean": 0.5},
    ],
)
def test_it_says_what_the_library_computes(more: dict[str, object], tmp_path: Path) -> None:
    said = GOOD | {"do_resize": False, "image_processor_type": "ViTImageProcessorPil"} | more
    beside(tmp_path, said | {"size": {"height": 8, "width": 8}})
    pixels = torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    kind = getattr(hf, "ViTImageProcessorPil", None) or hf.ViTImageProcessor
    theirs = kind.from_pretrained(tmp_path)(pixels, return_tensors="pt")["pixel_values"]
    scale = standardisation_beside(tmp_path, 3)
    assert scale is not None
    mine = scale.apply(pixels[None].float() / 255)
    torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-5)


def test_where_there_is_none_nothing_is_said(tmp_path: Path) -> None:
    assert standardisation_beside(tmp_path, 3) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4,
    )  # fmt: skip
    hf.ViTForImageClassification(config).save_pretrained(tmp_path)
    assert load_model(f"transformers:{tmp_path}").weights == "trained"
    return tmp_path


def test_weights_that_lack_a_layer_are_an_error(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    last = {name: w for name, w in weights.items() if ".1." not in name}
    assert len(last) < len(weights)
    save_file(last, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no vit\..*\.1\..* among its weights"):
        load_model(f"transformers:{folder}")


def test_weights_of_a_layer_too_many_are_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"too many weights, such as vit\..*\.1\."):
        load_model(f"transformers:{folder}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model_type": "theirs", "auto_map": {"AutoConfig": "evil.C"}}, r"auto_map.*never run"),
        ({"attn_implementation": "somebody/kernel"}, r"code of the hub, which is never run"),
        ({"architectures": "ViTModel"}, "architectures"),
        ({"architectures": ["pipeline"]}, None),
    ],
)
def test_a_config_that_names_code_is_refused(
    more: dict[str, object], message: str | None, folder: Path
) -> None:
    (folder / "evil.py").write_text("open('marker', 'w')\nclass C: ...\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))
    if message is None:  # no class of models: the family's own instead
        assert isinstance(load_model(f"transformers:{folder}").model, hf.PreTrainedModel)
        return
    with pytest.raises(InputError, match=message):
        load_model(f"transformers:{folder}")
    assert not Path("marker").exists()
