"""How a run's batches come out of its settings."""

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.run.datasets import load_data


def test_tokens_per_batch_is_a_whole_number_of_rows_for_every_device(chat_model, chats, tmp_path):
    given = dict(model=str(chat_model), dataset=str(chats), output=str(tmp_path), sample_prompts=0)
    config = Config.load(given | dict(max_seq_length=64, tokens_per_batch=64 * 7))
    model, tokenizer = mp.abstract(chat_model)[0], mp.load_tokenizer(chat_model)
    sizes = {n: load_data(config, model, tokenizer, n).train.batch_size for n in (1, 2, 4, 8)}
    assert sizes == {1: 7, 2: 6, 4: 4, 8: 8}
