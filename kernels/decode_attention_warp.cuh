// A warp's part of a segment: it streams slices of pages and exact tokens through its ring. Part of decode_attention.cu, for
// TEAM == 1; decode_attention_team.cuh does the same for more query rows than one warp has registers for.
#pragma once

#include "decode_attention_warp_products.cuh"

#if SCORES
// Leave what the warp has summed when it is done with a page, or with the part of it that it reads: of each row the sum of
// 2^(score - top), and top. A page's own mass is the difference to the page before; `reduce_scores` takes it, since
// here every instruction would count. Part 0 is of the warp that has read the page's first slice; if that one was the
// warp's own first, there is nothing to subtract (flag 1); if it has not read the last (no flag 2), part 1 has the rest.
DEV void emit(const State& st, const Params& p, const Segment& seg, int slot, int part, int flags, int lane) {
  const i64 at = (i64)slot * p.num_heads + seg.head;
  float2* to = p.raw + (at * 2 + part) * p.raw_rows + seg.tile * ROWS;
  if (lane < 4)
#pragma unroll
    for (int n = 0; n < NT; n++)
      *(float4*)(to + n * 8 + 2 * lane) = make_float4(st.sums[n][0][2], st.top[n][0], st.sums[n][0][3], st.top[n][1]);
  if (lane < NT && part == 0) p.raw_flags[at * (p.raw_rows / 8) + seg.tile * NT + lane] = flags;
}
#endif

DEV void load_query(u32 (&x)[NT][MT][2], const Params& p, const Segment& seg, int lane) {
#pragma unroll
  for (int n = 0; n < NT; n++) load_query_tile(x[n], n, p, seg, lane);
}

DEV void attend(State& st, const Params& p, const Segment& seg, int begin, int end, u32 ring, u32 query, const Member&,
                int lane) {
  reset(st);
  if (is_empty(seg)) return;
  const Part part = part_of_segment(seg, begin, end);
  const int start = part.start, plain = part.plain, skipped = part.skipped, slice_b = part.slice_b;

  // Everything that the first slices wait for is requested before any of it is used.
  const int* table = p.block_table + (i64)seg.request * p.block_table_stride;
  const int page_b = slice_b / PER, last_page = seg.last / G;
  int ids = page_id(p, seg, table, page_b + lane, last_page),
      next_ids = page_id(p, seg, table, page_b + 32 + lane, last_page);
  const int window_id = window_block(p, seg, start, lane);
  u32 rows[NT][MT][2];
  load_query(rows, p, seg, lane);
  const int exact_start = first_exact(seg, start, window_id, lane);
  const int low = max(start, exact_start),
            high = max(window_start(seg.last), exact_start);  // boundaries of first and last row
  const int slice_e = min(part.most_e, (high + 31) / 32 - skipped);

  if (slice_b < slice_e) {
    const unsigned char* pool = p.pages + seg.head * p.head_stride;
    int loaded = slice_b;
    auto load_next = [&](int slot) {
      if (loaded < slice_e) {
        const int index = loaded / PER - page_b, of_page = loaded & (PER - 1);
        if ((index & 31) == 0 && index > 0 && of_page == 0) {
          ids = next_ids;
          next_ids = page_id(p, seg, table, page_b + index + 32 + lane, last_page);
        }
        const unsigned char* page = pool + __shfl_sync(ALL, ids, index & 31) * p.page_stride;
        load_slice(ring + slot * STAGE, page, of_page, of_page == 0 || loaded == slice_b, lane);
      }
      loaded++;
      end_batch();
    };
    __syncwarp();
#if SCORES
    // Written by the kernel before this one, perhaps: not read before the wait, as a segment is.
    const int scored_at = p.num_scored[seg.request] > 0 ? p.begin[seg.request] : -1;
#endif
#pragma unroll
    for (int i = 0; i < S - 1; i++) load_next(i);
#pragma unroll
    for (int n = 0; n < NT; n++) keep_query_tile(rows[n], n, seg, query, lane);
    Keys keys;
    int slot = 0;
    auto next_slice = [&](int i, bool new_page) {
      wait_for_batches<S - 2>();
      __syncwarp();
      load_next(slot == 0 ? S - 1 : slot - 1);
      const u32 stage = ring + slot * STAGE;
      if (new_page) scale_query(keys, stage, query, lane);
      const int token = (i + skipped) * 32;  // of the list: a smaller one than it has, and read by every row as well
      attend_slice(st, keys, stage, p, seg, token, exact_start, token + 32 > low, lane);
      slot = slot == S - 1 ? 0 : slot + 1;
    };
#if SCORES  // a loop of their own for the slices of a page: what is left of it costs registers, and every slice would pay
    for (int page = slice_b / PER; page * PER < slice_e; page++) {
      const int page_b = max(slice_b, page * PER), page_e = min(slice_e, page * PER + PER);
      for (int i = page_b; i < page_e; i++) next_slice(i, i == page_b);
      if (page_b < plain && scored_at >= 0) {
        const bool whole = page_e == page * PER + PER;
        emit(st, p, seg, scored_at + page, slice_b > page * PER, (slice_b == page * PER) | whole << 1, lane);
      }
    }
#else
    for (int i = slice_b; i < slice_e; i++) next_slice(i, i == slice_b || (i & (PER - 1)) == 0);
#endif
    wait_for_batches<0>();
    __syncwarp();
  }

  const int token_b = max(start + part.recent_b * 16, low & ~15), token_e = min(start + part.recent_e * 16, seg.last + 1);
  if (token_b < token_e) {
    wait_for_predecessor();
    const unsigned char* pool = p.window + seg.head * p.window_head_stride;
    int loaded = token_b;
    auto load_next = [&](int slot) {
      if (loaded < token_e) {
        const int id = __shfl_sync(ALL, window_id, loaded / WINDOW_BLOCK - start / WINDOW_BLOCK);
        load_window(ring + slot * WIN_STAGE, pool, p.window_stride, id, loaded, low, seg.last, lane);
      }
      loaded += 16;
      end_batch();
    };
#pragma unroll
    for (int i = 0; i < WIN_STAGES; i++) load_next(i);
    if (slice_b < slice_e) load_query(rows, p, seg, lane);
    int slot = 0;
    for (int token = token_b; token < token_e; token += 16) {
      wait_for_batches<WIN_STAGES - 1>();
      __syncwarp();
      attend_window(st, rows, ring + slot * WIN_STAGE, p, seg, token, exact_start, lane);
      __syncwarp();
      load_next(slot);
      slot = slot + 1 == WIN_STAGES ? 0 : slot + 1;
    }
    wait_for_batches<0>();
    __syncwarp();
  }
}
