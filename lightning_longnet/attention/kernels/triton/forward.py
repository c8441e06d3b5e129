"""The forward in Triton: out and lse of the items of a phase, merged with those in memory."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ITEM = tl.constexpr(6)  # the numbers of an item, and of a span: see `TileList`
SPAN = tl.constexpr(13)


@triton.jit
def forward(q, k, v, out, lse, lists, padding, scale, form: tl.constexpr):
    """Compute out and lse of one item: its queries against all spans of keys that they see.

    `launch.forward_parts` launches it, a program for each item, sample and query head.  Scores are in units of log 2.
    The running maximum `top` is that of scores without the weights of pairs, which are small numbers: nothing
    overflows.

    The weight of a pair is the smaller of two levels, of its query and of its key.  A level is 1 and 1 more for each
    rate of `Form.every` that divides the row's place; the rates divide one another, so those that divide both places
    are those of the smaller level.
    """
    item = lists.items + tl.program_id(0) // lists.programs * ITEM
    lane = tl.program_id(0) % lists.programs
    batch = (lane // form.group).to(tl.int64)
    key_head = tl.load(item).to(tl.int64)
    head = key_head * form.group + lane % form.group
    x = tl.arange(0, form.rows)
    row = (tl.load(item + 1) + x * tl.load(item + 2)).to(tl.int64)
    is_row = x < tl.load(item + 3)
    d = tl.arange(0, form.padded_width)
    e = tl.arange(0, form.padded_value_width)
    queries = tl.load(
        q.data + batch * q.batch + head * q.head + row[:, None] * q.row + d[None, :],
        mask=is_row[:, None] & (d < form.width)[None, :],
        other=0.0,
    )
    of_k = k.data + batch * k.batch + key_head * k.head
    of_v = v.data + batch * v.batch + key_head * v.head
    of_lse = lse.data + batch * lse.batch + head * lse.head + row * lse.row
    of_out = out.data + batch * out.batch + head * out.head + row[:, None] * out.row + e[None, :]
    is_out = is_row[:, None] & (e < form.value_width)[None, :]
    if form.accumulates:
        top = tl.load(of_lse, mask=is_row, other=float("-inf")) * LOG2E
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        acc = tl.load(of_out, mask=is_out & (total > 0)[:, None], other=0.0).to(tl.float32)
    else:
        top = tl.full((form.rows,), float("-inf"), tl.float32)
        total = tl.full((form.rows,), 0.0, tl.float32)
        acc = tl.full((form.rows, form.padded_value_width), 0.0, tl.float32)
    peak = total  # the sum of weights before any are removed

    for n in range(tl.load(item + 4), tl.load(item + 5)):
        span = lists.spans + n * SPAN
        start, step, keys = tl.load(span), tl.load(span + 1), tl.load(span + 2)
        low, high = tl.load(span + 4), tl.load(span + 5)
        full_first, full_last = tl.load(span + 6), tl.load(span + 7)
        if form.is_joined:
            multiple, unit, least = tl.load(span + 3), tl.load(span + 10), 1.0 - tl.load(span + 11)
        else:
            multiple, unit, least = 1, 1, 1.0
        if len(form.every) > 0:
            level = tl.full((form.rows,), 0.0, tl.float32) + least
            for r in tl.static_range(len(form.every)):
                level += ((x * multiple * unit + tl.load(span + 8)) % form.every[r] == 0).to(tl.float32)
            log_level = tl.log2(level)
        for is_full in tl.static_range(2):
            if is_full:
                tiles = full_last - full_first
            else:
                tiles = (keys + form.others - 1) // form.others - (full_last - full_first)
            for t in range(tiles):
                if is_full:
                    y = (full_first + t) * form.others + tl.arange(0, form.others)
                else:
                    y = tl.where(t < full_first, t, t + full_last - full_first) * form.others
                    y += tl.arange(0, form.others)
                if form.is_received:
                    key_row = tl.load(lists.received + start + y, mask=y < keys, other=0).to(tl.int64)
                else:
                    key_row = (start + y * step).to(tl.int64)
                at_k = of_k + key_row[:, None] * k.row + d[None, :]
                at_v = of_v + key_row[:, None] * v.row + e[None, :]
                if is_full and form.width == form.padded_width:
                    k_tile = tl.load(at_k)
                else:
                    k_tile = tl.load(at_k, mask=(y < keys)[:, None] & (d < form.width)[None, :], other=0.0)
                score = tl.dot(queries, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2E)
                if not is_full:
                    distance = (x * multiple)[:, None] - y[None, :]
                    is_seen = (distance >= low) & (distance <= high) & (y < keys)[None, :]
                    score = tl.where(is_seen, score, float("-inf"))
                if form.is_padded:
                    at_padding = padding.data + batch * padding.batch + key_row * padding.row
                    masked = tl.load(at_padding, mask=y < keys, other=1)
                    score = tl.where((masked == 0)[None, :], score, float("-inf"))
                new_top = tl.maximum(top, tl.max(score, 1))
                finite = tl.where(new_top > float("-inf"), new_top, 0.0)
                if len(form.every) > 0:
                    other_level = tl.full((form.others,), 0.0, tl.float32) + least
                    for r in tl.static_range(len(form.every)):
                        other_level += ((y * unit + tl.load(span + 9)) % form.every[r] == 0).to(tl.float32)
                    log_other = tl.log2(other_level)
                    # the log of the smaller level, less the maximum
                    moved = tl.minimum((log_level - finite)[:, None], log_other[None, :] - finite[:, None])
                    p = tl.exp2(score + moved)
                else:
                    p = tl.exp2(score - finite[:, None])
                if form.is_signed:
                    p = p * tl.load(span + 12).to(tl.float32)
                shrink = tl.exp2(top - finite)
                total = total * shrink + tl.sum(p, 1)
                if form.is_signed:
                    peak = tl.maximum(peak * shrink, total)
                if is_full and form.value_width == form.padded_value_width:
                    v_tile = tl.load(at_v)
                else:
                    v_tile = tl.load(at_v, mask=(y < keys)[:, None] & (e < form.value_width)[None, :], other=0.0)
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
                top = new_top

    has_key = total > 0
    if form.is_signed:  # what stays where all keys were removed is the rounding of the sum
        has_key = total > peak * 1e-5
    divisor = tl.where(has_key, total, 1.0)
    acc = tl.where(has_key[:, None], acc / divisor[:, None], 0.0)
    tl.store(of_out, acc.to(out.data.dtype.element_ty), mask=is_out)
    tl.store(of_lse, tl.where(has_key, (top + tl.log2(divisor)) * LN2, float("-inf")), mask=is_row)
