import json

import pytest

from jgrpo.checkpoints.hf import eos_ids, load_tokenizer
from jgrpo.errors import UserError
from tests.tiny_checkpoints import make_checkpoint, make_tokenizer


def test_declared_pad_token_is_kept(pristine):
    assert load_tokenizer(pristine).pad_token == "<|pad|>"


def test_unused_pad_token_of_the_vocabulary_is_found(tmp_path):
    tokenizer = load_tokenizer(make_checkpoint(tmp_path, "llama", pad_token=None))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 259)


def test_without_one_eos_is_the_pad_token(checkpoint, monkeypatch):
    monkeypatch.setattr("jgrpo.checkpoints.tokenizer.PAD_CANDIDATES", ())
    make_tokenizer(pad_token=None).save_pretrained(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256


def test_neither_pad_nor_eos_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr("jgrpo.checkpoints.tokenizer.PAD_CANDIDATES", ())
    tokenizer = make_tokenizer(pad_token=None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(UserError, match="neither a pad nor an EOS token"):
        load_tokenizer(checkpoint)


def test_no_tokenizer(checkpoint):
    for file in [*checkpoint.glob("tokenizer*"), *checkpoint.glob("vocab*")]:
        file.unlink()
    with pytest.raises(UserError, match=r"no tokenizer \(tokenizer\.json"):
        load_tokenizer(checkpoint)


def test_damaged_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(checkpoint)


def test_eos_ids_are_the_generation_configs_and_the_tokenizers(checkpoint):
    assert eos_ids(checkpoint) == (258, 256)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.eos_token = "<|im_start|>"
    assert eos_ids(checkpoint, tokenizer) == (258, 256, 257)


def test_eos_ids_without_generation_config_are_the_configs(checkpoint):
    (checkpoint / "generation_config.json").unlink()
    assert eos_ids(checkpoint) == (256,)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert eos_ids(checkpoint) == ()
    assert eos_ids(checkpoint, load_tokenizer(checkpoint)) == (256,)
