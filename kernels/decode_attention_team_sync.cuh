// How the warps of a team meet, and agree on one `top`. Part of decode_attention.cu, for TEAM > 1.
#pragma once

#include "decode_attention_reads.cuh"
#include "decode_attention_softmax.cuh"

static_assert(NW % TEAM == 0 && S % TEAM == 0, "a team's warps have a stage each in every step");

DEV void team_sync(const Member& me) { asm volatile("bar.sync %0,%1;" ::"r"(1 + me.team), "n"(32 * TEAM) : "memory"); }
DEV bool team_any(const Member& me, bool x) {
  u32 r;
  asm volatile("{.reg .pred p,q;\n setp.ne.u32 p,%1,0;\n bar.red.or.pred q,%2,%3,p;\n selp.u32 %0,1,0,q;}"
               : "=r"(r)
               : "r"((u32)x), "r"(1 + me.team), "n"(32 * TEAM)
               : "memory");
  return r;
}
DEV float2 lds_float2(u32 a) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0,%1},[%2];" : "=f"(r.x), "=f"(r.y) : "r"(a));
  return r;
}
DEV void sts_float2(u32 a, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0],{%1,%2};" ::"r"(a), "f"(x), "f"(y) : "memory");
}
DEV void sts64(u32 a, u32 x, u32 y) { asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(a), "r"(x), "r"(y) : "memory"); }

// A larger `top` for the team, where the largest of its scores are above it by more than ROOM. Ends with all warps
// in step.
DEV void raise_together(State& st, const float (&high)[NT][2], u32 shared, const Member& me, int lane) {
  const u32 mine = shared + TEAM_HIGH + (lane & 3) * 8;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float x = max_of_rows(high[n][0]), y = max_of_rows(high[n][1]);
    if (lane < 4) sts_float2(mine + (me.index * ROWS + n * 8) * 4, x, y);
  }
  team_sync(me);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float x[2] = {NEVER, NEVER};
#pragma unroll
    for (int w = 0; w < TEAM; w++) {
      const float2 y = lds_float2(mine + (w * ROWS + n * 8) * 4);
      x[0] = fmaxf(x[0], y.x), x[1] = fmaxf(x[1], y.y);
    }
    rescale(st, n, x);
  }
}

// One `top` for the team, which nobody raises alone. `has`: this warp has scores.
template <int N>
DEV void raise_team_top(State& st, const float (&s)[NT][N][4], float scale, bool has, u32 shared, const Member& me,
                        int lane) {
  float high[NT][2];
  if (team_any(me, above_top(high, st, s, scale, has))) raise_together(st, high, shared, me, lane);
}

// ---- Which pages a segment reads ------------------------------------------------------------------------------------
// The pool blocks of its old pages, one after another: a lane has one of 32 pages, and one of the 32 after those.
struct PageIds {
  const int* table;
  int first, last_page, ids, next_ids;

  DEV void begin(const Params& p, const Segment& seg, const int* block_table, int page, int lane) {
    table = block_table, first = page, last_page = seg.last / G;
    ids = page_id(p, seg, table, first + lane, last_page);
    next_ids = page_id(p, seg, table, first + 32 + lane, last_page);
  }
  // `page` is the one that was asked for last, or the one after it.
  DEV int next(const Params& p, const Segment& seg, int page, int lane) {
    if (page - first >= 32) {
      first += 32, ids = next_ids;
      next_ids = page_id(p, seg, table, first + 32 + lane, last_page);
    }
    return __shfl_sync(ALL, ids, page - first);
  }
};

struct Pages {
  PageIds ids;
  int slice_e, low, exact_start;  // the last slice's end; tokens below `low` are read by every row; see `first_exact`
};

// Which pages a part of a segment reads; returns a lane's block of the window.
DEV int begin_pages(Pages& r, const Params& p, const Segment& seg, const Part& part, int lane) {
  r.ids.begin(p, seg, p.block_table + (i64)seg.request * p.block_table_stride, part.slice_b / PER, lane);
  const int window_id = window_block(p, seg, part.start, lane);
  r.exact_start = first_exact(seg, part.start, window_id, lane), r.low = max(part.start, r.exact_start);
  const int high = max(window_start(seg.last), r.exact_start);
  r.slice_e = min(part.most_e, (high + 31) / 32 - part.skipped);
  return window_id;
}
