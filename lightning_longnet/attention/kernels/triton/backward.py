"""The backward in Triton: dq by items of queries, dk and dv by items of keys, so that nothing is added atomically."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
ITEM = tl.constexpr(6)  # the numbers of an item, and of a span: see `TileList`
SPAN = tl.constexpr(13)


@triton.jit
def query_gradient(q, k, v, grad, statistics, dq, lists, padding, scale, form: tl.constexpr):
    """Compute dq of one item of queries from all spans of keys that they see: dS = P (grad . v - delta), dq = dS k.

    `launch.backward_parts` launches it, a program for each item, sample and query head.  `statistics` are the lse of
    the whole softmax and delta, grad . out, of each query; see `Lists` and `Form` for the tile list and the constants.
    Levels are the weights of pairs, as in the forward.
    """
    lse, delta = statistics
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
    is_wide = is_row[:, None] & (d < form.width)[None, :]
    queries = tl.load(
        q.data + batch * q.batch + head * q.head + row[:, None] * q.row + d[None, :], mask=is_wide, other=0.0
    )
    dout = tl.load(
        grad.data + batch * grad.batch + head * grad.head + row[:, None] * grad.row + e[None, :],
        mask=is_row[:, None] & (e < form.value_width)[None, :],
        other=0.0,
    )
    # a row without keys has an lse of +inf, and so has a row that is none
    query_lse = tl.load(lse.data + batch * lse.batch + head * lse.head + row * lse.row, mask=is_row, other=float("inf"))
    query_lse *= LOG2E
    query_delta = tl.load(
        delta.data + batch * delta.batch + head * delta.head + row * delta.row, mask=is_row, other=0.0
    )
    of_k = k.data + batch * k.batch + key_head * k.head
    of_v = v.data + batch * v.batch + key_head * v.head
    acc = tl.full((form.rows, form.padded_width), 0.0, tl.float32)

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
                if is_full and form.value_width == form.padded_value_width:
                    v_tile = tl.load(at_v)
                else:
                    v_tile = tl.load(at_v, mask=(y < keys)[:, None] & (e < form.value_width)[None, :], other=0.0)
                if form.is_padded:
                    at_padding = padding.data + batch * padding.batch + key_row * padding.row
                    is_token = tl.load(at_padding, mask=y < keys, other=1) == 0
                score = tl.dot(queries, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2E)
                dp = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
                if len(form.every) > 0:
                    other_level = tl.full((form.others,), 0.0, tl.float32) + least
                    for r in tl.static_range(len(form.every)):
                        other_level += ((y * unit + tl.load(span + 9)) % form.every[r] == 0).to(tl.float32)
                    log_other = tl.log2(other_level)
                    if form.is_padded:
                        log_other = tl.where(is_token, log_other, float("-inf"))
                    moved = tl.minimum((log_level - query_lse)[:, None], log_other[None, :] - query_lse[:, None])
                    p = tl.exp2(score + moved)
                else:
                    p = tl.exp2(score - query_lse[:, None])
                if not is_full:
                    distance = (x * multiple)[:, None] - y[None, :]
                    is_seen = (distance >= low) & (distance <= high) & (y < keys)[None, :]
                    p = tl.where(is_seen, p, 0.0)
                if form.is_padded and len(form.every) == 0:
                    p = tl.where(is_token[None, :], p, 0.0)
                if form.is_signed:
                    p = p * tl.load(span + 12).to(tl.float32)
                ds = p * (dp - query_delta[:, None])
                acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    at_dq = dq.data + batch * dq.batch + head * dq.head + row[:, None] * dq.row + d[None, :]
    acc *= scale
    if form.accumulates:
        acc += tl.load(at_dq, mask=is_wide, other=0.0).to(tl.float32)
    tl.store(at_dq, acc.to(dq.data.dtype.element_ty), mask=is_wide)


@triton.jit
def key_gradients(q, k, v, grad, statistics, gradients, lists, padding, scale, form: tl.constexpr):
    """Compute dk and dv of one item of keys from all spans of queries that see them: dv = P grad, dk = dS q.

    `launch.backward_parts` launches it after `query_gradient`, a program for each item and sample.  `statistics` are as
    there, and `gradients` are dk and dv.  The query heads of a group are taken one after the other, so that their sum
    needs no atomic addition.
    """
    lse, delta = statistics
    dk, dv = gradients
    item = lists.items + tl.program_id(0) // lists.programs * ITEM
    batch = (tl.program_id(0) % lists.programs).to(tl.int64)
    key_head = tl.load(item).to(tl.int64)
    x = tl.arange(0, form.rows)
    is_row = x < tl.load(item + 3)
    if form.is_received:
        row = tl.load(lists.received + tl.load(item + 1) + x, mask=is_row, other=0).to(tl.int64)
    else:
        row = (tl.load(item + 1) + x * tl.load(item + 2)).to(tl.int64)
    d = tl.arange(0, form.padded_width)
    e = tl.arange(0, form.padded_value_width)
    is_wide = is_row[:, None] & (d < form.width)[None, :]
    is_value = is_row[:, None] & (e < form.value_width)[None, :]
    keys = tl.load(
        k.data + batch * k.batch + key_head * k.head + row[:, None] * k.row + d[None, :], mask=is_wide, other=0.0
    )
    values = tl.load(
        v.data + batch * v.batch + key_head * v.head + row[:, None] * v.row + e[None, :], mask=is_value, other=0.0
    )
    if form.is_padded:
        masked = tl.load(padding.data + batch * padding.batch + row * padding.row, mask=is_row, other=1)
    dk_acc = tl.full((form.rows, form.padded_width), 0.0, tl.float32)
    dv_acc = tl.full((form.rows, form.padded_value_width), 0.0, tl.float32)

    for member in range(form.group):
        head = key_head * form.group + member
        of_q = q.data + batch * q.batch + head * q.head
        of_grad = grad.data + batch * grad.batch + head * grad.head
        of_lse = lse.data + batch * lse.batch + head * lse.head
        of_delta = delta.data + batch * delta.batch + head * delta.head
        for n in range(tl.load(item + 4), tl.load(item + 5)):
            span = lists.spans + n * SPAN
            start, step, queries = tl.load(span), tl.load(span + 1), tl.load(span + 2)
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
                    tiles = (queries + form.others - 1) // form.others - (full_last - full_first)
                for t in range(tiles):
                    if is_full:
                        y = (full_first + t) * form.others + tl.arange(0, form.others)
                    else:
                        y = tl.where(t < full_first, t, t + full_last - full_first) * form.others
                        y += tl.arange(0, form.others)
                    is_query = y < queries
                    query_row = (start + y * step).to(tl.int64)
                    at_q = of_q + query_row[:, None] * q.row + d[None, :]
                    at_grad = of_grad + query_row[:, None] * grad.row + e[None, :]
                    if is_full and form.width == form.padded_width:
                        q_tile = tl.load(at_q)
                    else:
                        q_tile = tl.load(at_q, mask=is_query[:, None] & (d < form.width)[None, :], other=0.0)
                    if is_full and form.value_width == form.padded_value_width:
                        dout = tl.load(at_grad)
                    else:
                        dout = tl.load(at_grad, mask=is_query[:, None] & (e < form.value_width)[None, :], other=0.0)
                    row_lse = tl.load(of_lse + query_row * lse.row, mask=is_query, other=float("inf")) * LOG2E
                    row_delta = tl.load(of_delta + query_row * delta.row, mask=is_query, other=0.0)
                    score = tl.dot(keys, tl.trans(q_tile), input_precision="ieee") * (scale * LOG2E)
                    if len(form.every) > 0:
                        other_level = tl.full((form.others,), 0.0, tl.float32) + least
                        for r in tl.static_range(len(form.every)):
                            other_level += ((y * unit + tl.load(span + 9)) % form.every[r] == 0).to(tl.float32)
                        log_other = tl.log2(other_level) - row_lse
                        moved = tl.minimum(log_level[:, None] - row_lse[None, :], log_other[None, :])
                        p = tl.exp2(score + moved)
                    else:
                        p = tl.exp2(score - row_lse[None, :])
                    if not is_full:
                        distance = (x * multiple)[:, None] - y[None, :]
                        is_seen = (distance >= low) & (distance <= high) & is_query[None, :]
                        p = tl.where(is_seen, p, 0.0)
                    if form.is_padded:
                        p = tl.where((masked == 0)[:, None], p, 0.0)
                    if form.is_signed:
                        p = p * tl.load(span + 12).to(tl.float32)
                    dv_acc = tl.dot(p.to(dout.dtype), dout, dv_acc, input_precision="ieee")
                    dp = tl.dot(values, tl.trans(dout), input_precision="ieee")
                    ds = p * (dp - row_delta[None, :])
                    dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

    at_dk = dk.data + batch * dk.batch + key_head * dk.head + row[:, None] * dk.row + d[None, :]
    at_dv = dv.data + batch * dv.batch + key_head * dv.head + row[:, None] * dv.row + e[None, :]
    dk_acc *= scale
    if form.accumulates:
        dk_acc += tl.load(at_dk, mask=is_wide, other=0.0).to(tl.float32)
        dv_acc += tl.load(at_dv, mask=is_value, other=0.0).to(tl.float32)
    tl.store(at_dk, dk_acc.to(dk.data.dtype.element_ty), mask=is_wide)
    tl.store(at_dv, dv_acc.to(dv.data.dtype.element_ty), mask=is_value)
