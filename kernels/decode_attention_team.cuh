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

#include "decode_attention_team_exact.cuh"
#if WGMMA
#include "decode_attention_team_wgmma.cuh"
#else
#include "decode_attention_team_products.cuh"
#endif

DEV void attend(State& st, const Params& p, const Segment& seg, int begin, int end, u32 ring, u32 shared, const Member& me,
                int lane) {
  reset(st);
  if (is_empty(seg)) return;
  const Part part = part_of_segment(seg, begin, end);
  const int start = part.start;
  Pages pages;
  const int window_id = begin_pages(pages, p, seg, part, lane), exact_start = pages.exact_start;
  const int low = pages.low;

  if (part.slice_b < pages.slice_e) attend_pages(st, p, seg, part, pages, ring, shared, me, lane);
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
