"""The decode loop against the full forward, and its filters against plain NumPy."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lowered import text_as_called
from tests.model.test_transformer import CONFIG
from tests.tiny import make_empty_cache
from tinystories_jax.errors import UserError
from tinystories_jax.model import generate as generate_module
from tinystories_jax.model.generate import Sampling, generate, generate_chunks
from tinystories_jax.model.matmul import PACKED, TRANSPOSED
from tinystories_jax.model.transformer import (
    decode_step,
    decode_weights,
    forward,
    init_params,
    prefill,
)

PROMPTS = [[0, 5, 9, 33], [0], [0, 7, 7, 7, 7, 7, 7, 7, 7]]
IN_BFLOAT16 = dataclasses.replace(CONFIG, dtype="bfloat16")
FORWARD = jax.jit(forward, static_argnames="config")
LIMITS = {"end_token": 0, "context_length": 48, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def params():
    # Larger than at initialisation, so that the distribution is far from flat.
    return jax.tree.map(lambda leaf: leaf * 6, init_params(CONFIG, jax.random.key(4)))


def write(params, prompts=PROMPTS, *, seed=0, **changes):
    sampling = Sampling(**{name: changes.pop(name) for name in list(changes) if name not in LIMITS})
    return generate(params, prompts, CONFIG, sampling, key=jax.random.key(seed), **(LIMITS | changes))


def write_in_bfloat16(params, prompts, **changes):
    return generate(params, prompts, IN_BFLOAT16, Sampling(), key=jax.random.key(0), **(LIMITS | changes))


def greedy_by_full_forward(params, prompt, num_new):
    tokens = list(prompt)
    for _ in range(num_new):
        # Padded to one length, for one compilation; causality keeps the padding out of the logits that are read.
        padded = jnp.array([tokens + [0] * (LIMITS["context_length"] - len(tokens))])
        tokens.append(int(FORWARD(params, padded, CONFIG)[0, len(tokens) - 1].argmax()))
        if tokens[-1] == LIMITS["end_token"]:
            break
    return tokens


def test_greedy_equals_repeated_full_forwards_for_unequal_prompts(params):
    assert write(params, temperature=0.0) == [greedy_by_full_forward(params, prompt, 12) for prompt in PROMPTS]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU writes in bfloat16")
def test_in_bfloat16_a_text_is_the_same_alone_and_beside_a_few(params):
    """Alone from packed matrices, beside others from the same in float32."""
    limits = {"end_token": -1, "max_new_tokens": 30}
    together = write_in_bfloat16(params, PROMPTS, **limits)
    alone = [write_in_bfloat16(params, [prompt], first_row=row, **limits)[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    # That says something: from matrices and a cache that are not rounded, a text is another.
    assert together != write(params, temperature=1.0, **limits)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU writes in bfloat16")
def test_a_cpu_multiplies_for_many_texts_in_bfloat16(params, monkeypatch):
    monkeypatch.setattr(generate_module, "multiplies_bfloat16", lambda: True)
    prompts = [[0, number] for number in range(1, 17)]
    texts = write_in_bfloat16(params, prompts, end_token=-1)
    of_a_few = [
        *write_in_bfloat16(params, prompts[:8], end_token=-1),
        *write_in_bfloat16(params, prompts[8:], end_token=-1, first_row=8),
    ]
    assert sum(ours != plain for ours, plain in zip(texts, of_a_few, strict=True)) >= 2
    # Half of them, told that they are part of 16, are multiplied alike.
    assert write_in_bfloat16(params, prompts[:8], end_token=-1, num_rows=16) == texts[:8]
    # Without instructions for it there is nothing to gain.
    monkeypatch.setattr(generate_module, "multiplies_bfloat16", lambda: False)
    assert write_in_bfloat16(params, prompts, end_token=-1) == of_a_few


def test_an_odd_context_ends_within_a_pair_of_packed_slots(params):
    """A text is that of a longer context, up to the end of its own."""
    prompts = [[0, 5, 9], [0]]
    limits = {"end_token": -1, "max_new_tokens": 40}
    longer = write_in_bfloat16(params, prompts, context_length=40, **limits)
    assert write_in_bfloat16(params, prompts, context_length=21, **limits) == [text[:21] for text in longer]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's attention is a product")
def test_matrices_in_bfloat16_are_not_converted_for_each_token(params):
    """All products with them have results in float32; what attention adds up is in float32."""
    batch_size, cache_length = 3, 40
    program = text_as_called(lower_decode_until(params, batch_size, cache_length, kept_as=TRANSPOSED))
    operands = re.findall(r"stablehlo.dot_general .*: \((.*)\) -> tensor<(.*)>", program)
    in_bfloat16 = [types for types, result in operands if types.count("xbf16>") == 2 and result.endswith("xf32")]
    in_float32 = [types for types, _ in operands if types.count("xf32>") == 2]
    assert len(in_bfloat16) == 4 * CONFIG.num_layers + 1
    assert len(in_float32) == 2 * CONFIG.num_layers
    of_all_slots = [types for types in in_float32 if f"x{cache_length}x" in types]  # sums of scores
    assert len(of_all_slots) == CONFIG.num_layers
    assert len(operands) == len(in_bfloat16) + len(in_float32)


def test_no_angle_is_computed_for_a_token(params):
    """XLA would compute its sine and cosine for every head of every layer."""
    program = text_as_called(lower_decode_until(params, 3, 40, kept_as="float32"))
    assert not re.findall(r"stablehlo\.(?:sine|cosine)", program)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU packs")
def test_packed_matrices_are_unpacked_where_they_are_multiplied(params):
    """No half of one is written to memory in float32, neither in the loop nor, for all steps, before it."""
    program = lower_decode_until(params, 1, 40, kept_as=PACKED, packed=True).compile().as_text()
    shape = rf"{CONFIG.d_model // 2},{2 * CONFIG.d_ff}\]"
    (loop,) = re.findall(r".* while\(.*", program)
    assert len(re.findall(rf"u32\[{shape}", loop)) == CONFIG.num_layers
    outside_of_fusions = [part for part in program.split("\n\n") if not part.lstrip().startswith("%fused_computation")]
    assert loop in "".join(outside_of_fusions)
    assert not re.findall(rf"= .*f32\[(?:1,)*{shape}.*", "".join(outside_of_fusions))


@pytest.mark.parametrize("kept_as", ["bfloat16", "float32", TRANSPOSED, PACKED])
def test_rounded_matrices_give_the_logits_of_float32_but_for_rounding(params, kept_as):
    packed = kept_as == PACKED
    weights = decode_weights(params, CONFIG, rounded_to="bfloat16", kept_as=kept_as)
    tokens_BT, lengths_B = jnp.array([[5, 9, 33, 8], [7, 7, 2, 0]]), jnp.array([3, 2])
    full_BTV, rows = FORWARD(params, tokens_BT, CONFIG), jnp.arange(2)
    logits_BV, cache = prefill(weights, tokens_BT, lengths_B, CONFIG, cache_length=6, packs_cache=packed)
    bound = 0.02 * float(jnp.abs(full_BTV).max())
    np.testing.assert_allclose(logits_BV, full_BTV[rows, lengths_B - 1], atol=bound)
    logits_BV, _ = decode_step(weights, tokens_BT[rows, lengths_B], lengths_B, cache, CONFIG)
    np.testing.assert_allclose(logits_BV, full_BTV[rows, lengths_B], atol=bound)


def test_texts_outgrow_the_first_cache(params):
    """With all slots from the start they are the same, also where chunks end within a cache, at its end and behind."""
    limits = {"end_token": -1, "context_length": 220, "max_new_tokens": 200}
    prompts = [[0, 5, 9, 33], [0]]
    texts = write(params, prompts, temperature=0.0, **limits)
    assert [len(text) for text in texts] == [204, 201]
    for text, prompt in zip(texts, prompts, strict=True):
        padded = jnp.array([text + [0] * (220 - len(text))])
        greedy = FORWARD(params, padded, CONFIG)[0].argmax(axis=-1)[len(prompt) - 1 : len(text) - 1]
        assert text[len(prompt) :] == greedy.tolist()
    for chunk_size in (50, 64, 128):
        *_, last = generate_chunks(
            params, prompts, CONFIG, Sampling(temperature=0), key=jax.random.key(0), chunk_size=chunk_size, **limits
        )
        assert last == texts


@pytest.mark.parametrize("num_texts", [1, 2])
def test_in_bfloat16_texts_outgrow_the_first_cache(params, num_texts, monkeypatch):
    """One is written from packed matrices, two are not; keys and values are packed for either, on a CPU."""
    limits = {"end_token": -1, "context_length": 220, "max_new_tokens": 200}
    grown = write_in_bfloat16(params, PROMPTS[:num_texts], **limits)
    assert [len(text) for text in grown] == [204, 201][:num_texts]
    monkeypatch.setattr(generate_module, "_SMALLEST_ROOM", 256)
    assert write_in_bfloat16(params, PROMPTS[:num_texts], **limits) == grown


def test_a_row_is_the_same_alone_and_in_a_batch(params):
    together = write(params, temperature=1.0)
    alone = [
        list(
            generate_chunks(
                params, [prompt], CONFIG, Sampling(), key=jax.random.key(0), chunk_size=12, first_row=row, **LIMITS
            )
        )[-1][0]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU runs one program")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_two_programs_at_once_write_what_one_writes(params, temperature, monkeypatch):
    """Rows of unequal length, the last chunk in a grown cache: each row draws by its own key in either."""
    prompts = [[0, *range(1, 1 + row)] for row in range(18)]
    limits = {"end_token": 0, "context_length": 120, "max_new_tokens": 70, "chunk_size": 30}

    def chunks():
        return list(
            generate_chunks(
                params, prompts, CONFIG, Sampling(temperature=temperature), key=jax.random.key(2), first_row=3, **limits
            )
        )

    jax.clear_caches()
    in_two = chunks()
    programs: Any = generate_module
    assert programs._decode_until._cache_size() == 2  # one for each length of the cache, whatever the groups
    monkeypatch.setattr(generate_module, "_NUM_GROUPS", 1)
    in_one = chunks()
    assert programs._decode_until._cache_size() == 4  # all rows in one is another shape, so there were groups before
    assert in_two == in_one
    assert len({len(text) - len(prompt) for text, prompt in zip(in_one[-1], prompts, strict=True)}) > 1


def test_seed_decides_the_draw(params):
    assert write(params, seed=1) == write(params, seed=1)
    assert write(params, seed=1) != write(params, seed=2)


def test_chunks_grow_to_the_same_texts(params):
    chunks = list(generate_chunks(params, PROMPTS, CONFIG, Sampling(), key=jax.random.key(3), chunk_size=5, **LIMITS))
    assert chunks[-1] == write(params, seed=3)
    for earlier, later in itertools.pairwise(chunks):
        assert all(after[: len(before)] == before for before, after in zip(earlier, later, strict=True))


def test_rows_stop_after_the_end_token(params):
    # With one token left to draw from, every row is the token that greedy decoding picks; take it as the end token.
    first = greedy_by_full_forward(params, PROMPTS[0], 3)
    texts = write(params, [PROMPTS[0]], temperature=0.0, end_token=first[len(PROMPTS[0])])
    assert texts == [first[: len(PROMPTS[0]) + 1]]


def test_the_context_is_never_exceeded(params):
    texts = write(params, [[0] * 40, [0, 1]], max_new_tokens=1000, end_token=96, temperature=0.0)
    assert [len(text) for text in texts] == [48, 48]


def test_top_k_one_is_greedy(params):
    assert write(params, top_k=1, temperature=2.0) == write(params, temperature=0.0)


def allowed_tokens(logits, **changes):
    """Returns the share of 4,000 draws that fall on each token."""
    logits_BV = jnp.broadcast_to(jnp.array(logits, jnp.float32), (4000, len(logits)))
    options = {"temperature": 1.0, "top_k": len(logits), "top_p": 1.0, "repetition_penalty": 1.0} | changes
    draw = generate_module._Draw(**{name: jnp.asarray(value) for name, value in options.items()})
    keys_B = jax.random.split(jax.random.key(0), 4000)
    filters = generate_module._Filters(greedy=False, truncate=True, penalize=False)
    drawn_B = generate_module._sample(logits_BV, None, keys_B, draw, filters, 0)  # type: ignore[arg-type]
    return np.bincount(drawn_B, minlength=len(logits)) / 4000


@pytest.mark.parametrize("vocab_size", [1, 2, 97, 10_000])
def test_draws_follow_the_softmax(vocab_size):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal(vocab_size).astype(np.float32)
    logits[1::3] = -np.inf
    num_draws = 20_000
    weights = jnp.broadcast_to(jax.nn.softmax(logits), (1000, vocab_size))
    draw = jax.jit(lambda keys_B: generate_module._draw_index(keys_B, weights))
    keys = jax.random.split(jax.random.key(1), num_draws).reshape(-1, 1000)
    drawn = np.concatenate([draw(keys_B) for keys_B in keys])
    counts = np.bincount(drawn, minlength=vocab_size)
    expected = num_draws * np.asarray(jax.nn.softmax(logits.astype(np.float64)))
    assert counts[np.isneginf(logits)].sum() == 0
    # Tokens that are expected less than 20 times are counted as one; 5 standard deviations.
    often = expected >= 20
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected) + 1e-9).all()
    statistic = ((observed - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    freedom = max((expected > 0).sum() - 1, 1)
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom)


def test_the_ends_of_the_running_sum_are_never_overrun():
    weights = jnp.array([[0.0, 1e-30, 3.0, 0.0, 1e8, 0.0]])
    for target, index in ((0.0, 1), (1e-31, 1), (2.0, 2), (1e8, 4), (2e8, 4)):
        assert generate_module._choose(weights, jnp.array([target]))[0] == index


def test_top_k_and_top_p_keep_just_the_likeliest():
    logits = np.log([0.1, 0.5, 0.15, 0.25])
    np.testing.assert_allclose(allowed_tokens(logits), [0.1, 0.5, 0.15, 0.25], atol=0.03)
    np.testing.assert_allclose(allowed_tokens(logits, top_k=2), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(allowed_tokens(logits, top_p=0.6), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(allowed_tokens(logits, top_p=0.5), [0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(allowed_tokens(logits, top_k=3, top_p=0.8), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    sharpened = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose(allowed_tokens(logits, temperature=0.5), sharpened / sharpened.sum(), atol=0.03)


def test_ties_do_not_let_more_than_k_tokens_in():
    assert (allowed_tokens([1.0, 1.0, 1.0, 0.0], top_k=2) > 0).sum() == 2


def test_repetition_penalty_changes_what_is_written(params):
    plain, penalized = (write(params, temperature=0.0, repetition_penalty=penalty) for penalty in (1.0, 10.0))
    assert plain != penalized


def test_repetition_penalty_falls_on_the_tokens_of_the_text_only():
    state = generate_module.DecodeState(
        jax.random.split(jax.random.key(0), 1),
        jnp.array([[0, 2, 3, 1]]),
        jnp.array([3]),
        jnp.array([False]),
        jnp.int32(0),
        make_empty_cache(CONFIG, 1, 4),
    )
    logits_BV = jnp.array([[1.0, 1.0, 4.0, -4.0]])
    penalized_BV = generate_module._penalize(logits_BV, state, jnp.float32(2.0), end_token=0)
    # Token 1 stands beyond the text's length: padding is not seen. The end token before the text is no part of it.
    np.testing.assert_allclose(penalized_BV, [[1.0, 1.0, 2.0, -8.0]])


def test_prompt_lengths_and_sampling_values_compile_a_handful_of_programs(params):
    jax.clear_caches()
    for length in range(1, 40):
        write(params, [[1] * length], max_new_tokens=4, temperature=0.5 + length / 100, top_k=length, seed=length)
    # Prompt buckets 32 and 48, the context.
    programs: Any = generate_module
    assert programs._start._cache_size() <= 2
    assert programs._decode_until._cache_size() <= 2


def lower_decode_until(params, batch_size, cache_length, *, kept_as, packed=False):
    state = generate_module.DecodeState(
        jax.random.split(jax.random.key(0), batch_size),
        jnp.zeros((batch_size, 48), jnp.int32),
        jnp.ones(batch_size, jnp.int32),
        jnp.zeros(batch_size, bool),
        jnp.int32(1),
        make_empty_cache(CONFIG, batch_size, cache_length, packed=packed),
    )
    draw = generate_module._Draw(jnp.float32(1), jnp.int32(97), jnp.float32(1), jnp.float32(1))
    filters = generate_module._Filters(greedy=True, truncate=False, penalize=False)
    jitted: Any = generate_module._decode_until
    weights = decode_weights(params, CONFIG, rounded_to="bfloat16", kept_as=kept_as)
    return jitted.lower(weights, state, np.int32(9), draw, config=CONFIG, filters=filters, end_token=0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's program has other operations")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_cache_is_written_in_place(params, batch_size, packed):
    """Copies of it for every token would be a large part of the time that a token takes."""
    cache_length = 160
    program = lower_decode_until(params, batch_size, cache_length, kept_as="float32", packed=packed).compile()
    loops = [part for part in program.as_text().split("\n\n") if " dot(" in part or "dot_general" in part]
    shapes = rf"[48],{cache_length}|{cache_length // 2 if packed else cache_length},8"
    assert all(any(re.search(rf"{shape}\]", loop) for loop in loops) for shape in shapes.split("|"))
    copies = [
        line
        for loop in loops
        if not loop.startswith("ENTRY")
        for line in loop.splitlines()
        if re.search(rf"= [fu]32\[[\d,]*(?:{shapes})\]\S* copy\(", line)
    ]
    assert copies == []


def test_what_cannot_be_generated_is_refused(params):
    with pytest.raises(UserError, match=r"prompt 2 has 48 tokens.*context of 48"):
        write(params, [[0], [0] * 48])
    with pytest.raises(UserError, match="prompt 1 has 0 tokens"):
        write(params, [[]])
    with pytest.raises(UserError, match="no prompt"):
        write(params, [])
    with pytest.raises(UserError, match="max_new_tokens=0"):
        write(params, max_new_tokens=0)


def test_sampling_reports_all_bad_values_at_once():
    with pytest.raises(UserError) as caught:
        Sampling(temperature=-1, top_k=-2, top_p=0, repetition_penalty=float("nan"))
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
    ]
