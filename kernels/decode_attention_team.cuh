// More query rows than one warp has registers for: a team of warps. Part of decode_attention.cu, for TEAM > 1.
//
// A step of a team is TEAM slices of one page. A warp multiplies one of them with all query rows, and leaves what it made,
// the probabilities, in shared memory; then it multiplies the values of all of them, those of its own channels. So codes
// become floats once, whoever needs them, and a warp holds the sums of a part of the channels. What all need of the query
// (scaled for the page) is read from shared memory.
//
//     warp 0   keys of slice 0 x query -> p0 |                | p0, p1, p2, p3 x values of slices 0 to 3, channels 0..31
//     warp 1   keys of slice 1 x query -> p1 |  the team has  | the same, channels 32..63
//     ...                                    | one `top`: a   |
//     warp 3   keys of slice 3 x query -> p3 | row's largest  | channels 96..127
//
// Exact tokens are treated alike, in steps of TEAM times 16. Sums of probabilities stay with the warp that made them until
// the team is done (`add_sums`).
#pragma once

#include "decode_attention_team_products.cuh"

// Sums of the whole team, through its ring, which is done with before and after.
DEV void add_sums(State& st, u32 ring, const Member& me, int lane) {
  team_sync(me);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int v = 0; v < NVG; v++) {
      const float* x = st.sums[n][v];
      sts128(ring + (((me.index * NT + n) * NVG + v) * 32 + lane) * 16,
             make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])));
    }
  team_sync(me);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int v = 0; v < NVG; v++) {
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < TEAM; w++) {
        const uint4 x = lds128(ring + (((w * NT + n) * NVG + v) * 32 + lane) * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += __uint_as_float(word(x, i));
      }
#pragma unroll
      for (int i = 0; i < 4; i++) st.sums[n][v][i] = sum[i];
    }
  team_sync(me);
}

#if SCORES
// As of one warp (decode_attention_warp.cuh); the team's sums meet where its largest scores do.
DEV void emit(const State& st, const Params& p, const Segment& seg, int slot, int part, int flags, u32 shared,
              const Member& me, int lane) {
  const u32 mine = shared + TEAM_HIGH + (lane & 3) * 8;
  team_sync(me);
#pragma unroll
  for (int n = 0; n < NT; n++)
    if (lane < 4) sts_float2(mine + (me.index * ROWS + n * 8) * 4, st.sums[n][0][2], st.sums[n][0][3]);
  team_sync(me);
  const i64 at = (i64)slot * p.num_heads + seg.head;
  float2* to = p.raw + (at * 2 + part) * p.raw_rows + seg.tile * ROWS;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    if (n % TEAM != me.index || lane >= 4) continue;
    float x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < TEAM; w++) {
      const float2 sum = lds_float2(mine + (w * ROWS + n * 8) * 4);
      x += sum.x, y += sum.y;
    }
    *(float4*)(to + n * 8 + 2 * lane) = make_float4(x, st.top[n][0], y, st.top[n][1]);
  }
  if (me.index == 0 && lane < NT && part == 0) p.raw_flags[at * (p.raw_rows / 8) + seg.tile * NT + lane] = flags;
}
#endif

DEV void attend(State& st, const Params& p, const Segment& seg, int begin, int end, u32 ring, u32 shared, const Member& me,
                int lane) {
  reset(st);
  if (seg.last < seg.first || seg.first < 0 || seg.rows <= 0) return;
  const Part part = part_of_segment(seg, begin, end);
  const int start = part.start, slice_b = part.slice_b;

  const int* table = p.block_table + (i64)seg.request * p.block_table_stride;
  const int page_b = slice_b / PER, last_page = seg.last / G;
  int first_id = 0, ids = page_id(p, seg, table, page_b + lane, last_page),
      next_ids = page_id(p, seg, table, page_b + 32 + lane, last_page);
  const int window_id = window_block(p, seg, start, lane), exact_start = first_exact(seg, start, window_id, lane);
  const int low = max(start, exact_start), high = max(window_start(seg.last), exact_start);
  const int slice_e = min(part.most_e, (high + 31) / 32 - part.skipped);

  if (slice_b < slice_e) {
    const unsigned char* pool = p.pages + seg.head * p.head_stride;
    const int step_b = slice_b / TEAM, step_e = (slice_e + TEAM - 1) / TEAM;
    int loaded = step_b;
    auto load_next = [&](int half) {
      const int slice = loaded * TEAM + me.index;
      if (loaded < step_e && slice >= slice_b && slice < slice_e) {
        const int index = slice / PER - page_b, of_page = slice & (PER - 1);
        if (index - first_id >= 32) {
          first_id += 32, ids = next_ids;
          next_ids = page_id(p, seg, table, page_b + first_id + 32 + lane, last_page);
        }
        const unsigned char* page = pool + __shfl_sync(ALL, ids, index - first_id) * p.page_stride;
        load_slice(ring + (half * TEAM + me.index) * STAGE, page, of_page, of_page == 0 || slice == slice_b, lane);
      }
      loaded++;
      end_batch();
    };
    team_sync(me);
#if SCORES
    const int scored_at = p.num_scored[seg.request] > 0 ? p.begin[seg.request] : -1;
#endif
#pragma unroll
    for (int i = 0; i < STEPS - 1; i++) load_next(i);
    for (int n = me.index; n < NT; n += TEAM) {
      u32 q[MT][2];
      load_query_tile(q, n, p, seg, lane);
      keep_query_tile(q, n, seg, shared, lane);
    }
    const float scale = p.scale / CODE_SCALE;
    int half = 0;
    for (int step = step_b; step < step_e; step++) {
      const int first = max(step * TEAM, slice_b), last = min(step * TEAM + TEAM, slice_e), slice = step * TEAM + me.index;
      const u32 stages = ring + half * TEAM * STAGE, stage = stages + me.index * STAGE;
      wait_for_batches<STEPS - 2>();
      team_sync(me);
      load_next(half == 0 ? STEPS - 1 : half - 1);
      if (first == slice_b || first % PER == 0) {
        scale_team_query(stages + (first - step * TEAM) * STAGE, shared, me, lane);
        team_sync(me);
      }
      const bool has = slice >= first && slice < last;
      float s[NT][2][4];
      if (has) {
        score_slice(s, stage, shared, lane);
        // Of the list: a smaller one than it has, and read by every row as well.
        const int token = (slice + part.skipped) * 32;
        if (token + 32 > low) mask_slice(s, seg, token, exact_start, lane);
      }
      raise_team_top(st, s, scale, has, shared, me, lane);
      if (has) leave_probabilities(st, s, stages, shared, scale, me, lane);
      team_sync(me);
      if (last - first == TEAM) {
#pragma unroll
        for (int i = 0; i < TEAM; i++) add_values(st, stages, shared, i, me, lane);
      } else {
        for (int i = first - step * TEAM; i < last - step * TEAM; i++) add_values(st, stages, shared, i, me, lane);
      }
#if SCORES
      const int page = first / PER, page_b = max(slice_b, page * PER), page_e = min(slice_e, page * PER + PER);
      if (last == page_e && page_b < part.plain && scored_at >= 0) {
        const bool whole = page_e == page * PER + PER;
        emit(st, p, seg, scored_at + page, slice_b > page * PER, (slice_b == page * PER) | whole << 1, shared, me, lane);
      }
#endif
      half = half == STEPS - 1 ? 0 : half + 1;
    }
    wait_for_batches<0>();
  }
  team_sync(me);

  const int token_b = max(start + part.recent_b * 16, low & ~15), token_e = min(start + part.recent_e * 16, seg.last + 1);
  if (token_b < token_e) {
    wait_for_predecessor();
    const unsigned char* pool = p.window + seg.head * p.window_head_stride;
    int loaded = token_b + me.index * 16;
    auto load_next = [&](int half) {
      if (loaded < token_e) {
        const int id = __shfl_sync(ALL, window_id, loaded / WINDOW_BLOCK - start / WINDOW_BLOCK);
        load_window(ring + (half * TEAM + me.index) * WIN_STAGE, pool, p.window_stride, id, loaded, low, seg.last, lane);
      }
      loaded += 16 * TEAM;
      end_batch();
    };
    load_next(0);
    int half = 0;
    for (int first = token_b; first < token_e; first += 16 * TEAM) {
      const int token = first + me.index * 16;
      const u32 stages = ring + half * TEAM * WIN_STAGE;
      wait_for_batches<0>();
      team_sync(me);
      half ^= 1;
      load_next(half);
      float s[NT][1][4];
      const bool has = token < token_e;
      if (has) score_window(s, stages + me.index * WIN_STAGE, p, seg, token, exact_start, lane);
      raise_team_top(st, s, p.scale, has, shared, me, lane);
      if (has) leave_exact_probabilities(st, s, shared, p.scale, me, lane);
      team_sync(me);
      for (int i = 0; i < TEAM && first + i * 16 < token_e; i++)
        add_exact_values(st, stages + i * WIN_STAGE, shared, i, me, lane);
    }
    wait_for_batches<0>();
  }
  add_sums(st, ring, me, lane);
}
