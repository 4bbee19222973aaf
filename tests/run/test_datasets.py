"""How a run's batches come out of its settings."""

from dataclasses import replace

import pytest

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.run.datasets import load_data


def test_tokens_per_batch_is_a_whole_number_of_rows_for_every_device(chat_model, chats, tmp_path):
    given = dict(model=str(chat_model), dataset=str(chats), output=str(tmp_path), sample_prompts=0)
    config = Config.load(given | dict(max_seq_length=64, tokens_per_batch=64 * 7))
    model, tokenizer = mp.abstract(chat_model)[0], mp.load_tokenizer(chat_model)
    sizes = {n: load_data(config, model, tokenizer, n).train.batch_size for n in (1, 2, 4, 8)}
    assert sizes == {1: 7, 2: 6, 4: 4, 8: 8}


@pytest.mark.parametrize("most, learned", [(200, True), (100, True), (100, False)])
def test_a_prompt_with_anothers_answer_needs_positions(chat_model, tmp_path, most, learned):
    """Of learned positions; those of RoPE go on."""
    data = tmp_path / "rated.jsonl"
    rows = [("red " * 16, "one"), ("red", "one " * 16)]
    data.write_text(
        "".join(f'{{"prompt": "{p}", "completion": "{c}", "label": true}}\n' for p, c in rows)
    )
    given = dict(model=str(chat_model), dataset=str(data), output=str(tmp_path), batch_size=2)
    keys = dict(method="preference", preference="kto", sample_prompts=0, chat_template=False)
    model, tokenizer = mp.abstract(chat_model)[0], mp.load_tokenizer(chat_model)
    arch = model.arch.replace(max_positions=most, learned_positions=learned)
    config = Config.load(given | keys)
    if learned and most == 100:
        words = r"prompt of .*:1 \(\d+ tokens\) may meet the answer of .*:2 \(\d+\).* at most 50"
        with pytest.raises(mp.UserError, match=words):
            load_data(config, replace(model, arch=arch), tokenizer, 1)
    else:
        assert len(load_data(config, replace(model, arch=arch), tokenizer, 1).train.examples) == 2
