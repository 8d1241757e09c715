"""The integers of a shared batch: every token in its place, once, and rows that obey the budget."""

import itertools
import pickle
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import LlamaConfig

from hf_lowmem.preference.sharing import KEYS, SharedPairs, shared_layout, without_sharing
from hf_lowmem.preference.sharing.layout import PLACES, SEGMENTS, SOURCE, pack
from hf_lowmem.preference.sharing.share import Visible, shared_masks
from tests.preference.sharing.families import LENGTHS, batch, examples

SIZES = [p + c + r for p, c, r in LENGTHS]
BUDGETS = [None, max(SIZES), 24, 33, sum(SIZES)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_plain_token_is_found_in_the_shared_rows(budget: int | None) -> None:
    made = batch(budget)
    shared_ids = made["input_ids"].take(made[SOURCE])
    back = shared_ids.flatten()[made[PLACES]]
    real = made["attention_mask"].bool()
    assert torch.equal(back[real], made["input_ids"][real])
    positions = (made[SOURCE] % made["input_ids"].shape[1]).flatten()[made[PLACES]]
    assert torch.equal(positions[real], torch.arange(real.shape[1]).expand_as(real)[real])


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_pair_takes_its_prompt_once(budget: int | None) -> None:
    segments = batch(budget)[SEGMENTS]
    for k, (prompt, chosen, rejected) in enumerate(LENGTHS):
        counts = [(segments == 3 * (k + 1) + branch).sum().item() for branch in range(3)]
        assert counts == [prompt, chosen, rejected]
    assert (segments > 0).sum().item() == sum(SIZES)


@pytest.mark.parametrize("budget", BUDGETS[1:])
def test_packed_rows_obey_the_budget(budget: int) -> None:
    assert batch(budget)[SOURCE].shape[1] <= budget


def test_one_row_that_holds_all_has_no_padding() -> None:
    assert batch(sum(SIZES))[SOURCE].shape == (1, sum(SIZES))


def fewest(sizes: list[int], room: tuple[int, ...], capacity: int) -> int:
    """The least number of rows, by trying every place for every thing."""
    if not sizes:
        return len(room)
    size, *others = sizes
    choices = [(*room[:r], left - size, *room[r + 1 :]) for r, left in enumerate(room) if left >= size]
    return min(fewest(others, choice, capacity) for choice in [*choices, (*room, capacity - size)])


def test_packing_finds_few_rows() -> None:
    """At most 11/9 of the best number and one, as first-fit-decreasing promises; the best of nearly all of these."""
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(30):
        sizes = torch.randint(1, 10, (6,), generator=generator).tolist()
        rows = pack(sizes, 12)
        assert sorted(itertools.chain(*rows)) == list(range(6))
        assert max(sum(sizes[i] for i in row) for row in rows) <= 12
        best = fewest(sizes, (), 12)
        assert len(rows) <= 11 / 9 * best + 1
        missed += len(rows) > best
    assert missed <= 1


def test_rows_are_filled_evenly() -> None:
    """First-fit-decreasing would fill 10 and 2, and both rows would be padded to 10."""
    assert sorted(pack([4, 4, 2, 2], 10)) == [[0, 2], [1, 3]]


def test_rejected_does_not_see_chosen_nor_another_pair() -> None:
    """The mask, entry by entry, against its definition."""
    made = batch(33)
    width = made["input_ids"].shape[1]
    segments, positions = made[SEGMENTS], made[SOURCE] % width
    for window in (None, 6):
        mask = Visible(segments, positions, window, width)
        rows, length = segments.shape
        for r, q, kv in itertools.product(range(rows), range(length), range(length)):
            one, other = int(segments[r, q]), int(segments[r, kv])
            seen = kv <= q and one // 3 == other // 3 and (other % 3 == 0 or other == one)
            if window is not None:
                seen = seen and int(positions[r, q] - positions[r, kv]) < window
            assert bool(mask(*(torch.tensor(i) for i in (r, 0, q, kv)))) == seen


@pytest.mark.parametrize("window", [None, 6])
def test_every_attention_gets_the_same_mask(window: int | None) -> None:
    """sdpa's by broadcasting, eager's of numbers to add, flex_attention's by vmap."""
    made = batch(33)
    width = made["input_ids"].shape[1]
    segments, positions = made[SEGMENTS], made[SOURCE] % width
    rows, length = segments.shape
    config: Any = LlamaConfig()
    config.sliding_window = window
    masks = {}
    for config._attn_implementation in ("sdpa", "eager"):
        masks[config._attn_implementation] = shared_masks(config, segments, positions, width, torch.float32)
    flex = create_mask(Visible(segments, positions, window, width), rows, 1, length, length, device="cpu")
    assert masks["sdpa"].dtype == torch.bool
    assert masks["sdpa"].shape == (rows, 1, length, length)
    assert torch.equal(masks["eager"] == 0, masks["sdpa"])
    assert torch.equal(flex, masks["sdpa"])
    assert masks["sdpa"].any(dim=-1).all()  # padding, too, sees something: no softmax over nothing


@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_are_padded_to_a_multiple(budget: int | None) -> None:
    made = batch(budget, pad_to_multiple_of=8)
    assert made[SOURCE].shape[1] % 8 == 0
    real = made["attention_mask"].bool()
    found = made["input_ids"].take(made[SOURCE]).flatten()[made[PLACES]]
    assert torch.equal(found[real], made["input_ids"][real])


def test_prompts_that_truncation_cut_differently_are_not_shared() -> None:
    equal = {"prompt_ids": list(range(3, 15)), "chosen_ids": [20, 21, 22], "rejected_ids": [30, 31, 32]}
    pairs = [*examples()[:1], equal]
    made = batch(None, pairs, max_length=10, truncation_mode="keep_end")
    counts = [[(made[SEGMENTS] == 3 * (k + 1) + branch).sum().item() for branch in range(3)] for k in range(2)]
    assert counts[0] == [0, 10, 10]  # 5 and 7 tokens of the prompt are left: other positions, other numbers
    assert counts[1] == [7, 3, 3]  # the same 7


def test_truncation_at_the_end_shares_what_is_left() -> None:
    made = batch(None, max_length=8)
    counts = [(made[SEGMENTS] == 3 + branch).sum().item() for branch in range(3)]
    assert counts == [8, 0, 0]  # a prompt that fills the row


def test_the_plain_batch_is_kept() -> None:
    made = batch(33)
    assert list(made)[-3:] == list(KEYS)  # behind input_ids, by which trainers count the batch
    assert list(without_sharing(made)) == ["input_ids", "attention_mask", "completion_mask"]


def test_the_collator_can_be_sent_to_a_worker() -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collator = SharedPairs(DataCollatorForPreference(pad_token_id=0), 33)
    made, again = collator(examples()), pickle.loads(pickle.dumps(collator))(examples())
    assert all(torch.equal(made[key], again[key]) for key in made)


def flipped() -> Any:
    return shared_layout(*(tensor.flip(1) for tensor in without_sharing(batch()).values()))


def halved() -> Any:
    return shared_layout(*(tensor[:3] for tensor in without_sharing(batch()).values()))


def wrapped(budget: Any) -> Any:
    return SharedPairs(lambda examples: {}, budget)


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: batch(max(SIZES) - 1), ValueError, ("lowmem_pack_tokens=19", "20 tokens", "max_length")),
        (lambda: wrapped(0), ValueError, ("lowmem_pack_tokens=0", "at least 1")),
        (lambda: wrapped(2.5), TypeError, ("lowmem_pack_tokens=2.5", "integer")),
        (flipped, ValueError, ("attention_mask", "pad on the right")),
        (halved, ValueError, ("3 rows", "two for each pair")),
    ],
    ids=["pair above the budget", "budget of nothing", "fractional budget", "padding on the left", "half a pair"],
)
def test_bad_batches_are_refused(build: Any, error: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        build()
    assert all(part in str(caught.value) for part in says)
