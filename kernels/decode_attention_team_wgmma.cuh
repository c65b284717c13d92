// A team's part of a segment's pages, with wgmma (Hopper): a team is a warp group. Part of decode_attention.cu, for WGMMA;
// decode_attention_team.cuh says how a team works.
//
// A step is a page. Codes become A fragments in registers, floats that no scale of a channel is missing from: keys are
// complete, values lack the scales of tokens, which the probabilities have. B, what all rows of the query bring, is never
// loaded: the tensor cores read it from shared memory, where it lies as rows of 64 channels or tokens (wgmma.cuh).
//
//     scores   A: 16 tokens of each warp's own slice, twice    B: the query, once per segment
//     values   A: 16 of each warp's own channels, twice        B: probabilities of all tokens of the page
//
// The warps meet once per step, with the probabilities of a step and the scores of the next:
//
//     scores of step i | all meet: does one raise `top`? | values of step i - 1 and probabilities of step i
//
// After the meeting the keys of step i and the values of step i - 2 are done with: each warp asks for a plane of the page
// that comes into their place in the ring (the copy engine brings it). Sums of probabilities are each lane's own, of 4 of a
// slice's tokens, in fp32.
#pragma once

#include "barriers.cuh"
#include "decode_attention_team_sums.cuh"
#define FACTORS "f16.f16"
#include "wgmma.cuh"

constexpr int OWN_J = J / TEAM;
static_assert(TEAM == 4 && PER == TEAM && J % TEAM == 0, "a step is a page, one slice for each of four warps");
static_assert(STEPS == 2 || STEPS == 3, "scales of values have four stages");
static_assert(NVG == 1, "a token has one scale");

DEV void sts128_trans(u32 a, u32 x, u32 y, u32 z, u32 w) {  // as load_matrices, each matrix transposed
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(a), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
// (a & mask) | (b & ~mask)
DEV u32 bits_of(u32 a, u32 b, u32 mask) {
  u32 r;
  asm("lop3.b32 %0,%1,%2,%3,0xe4;" : "=r"(r) : "r"(a), "r"(b), "r"(mask));
  return r;
}
// One lane of the warp, as the copy engine is asked: without a loop over those that might.
DEV bool elected() {
  u32 r;
  asm volatile("{.reg .pred p;\n elect.sync _|p,0xffffffff;\n selp.u32 %0,1,0,p;}" : "=r"(r));
  return r;
}
// Not later, where it is used.
DEV void compute_here(const unsigned char*& x) { asm volatile("" : "+l"(x)); }
// One of a pair of fp16.
DEV float half_of(u32 pair, int which) {
  float r;
  asm("{.reg .b16 l,h;\n mov.b32 {l,h},%1;\n cvt.f32.f16 %0,l;}" : "=f"(r) : "r"(pair >> 16 * which));
  return r;
}

// ---- The query -------------------------------------------------------------------------------------------------------
// Lane 4*g+t multiplies channels of tile j ^ t/2 (of 32 channels) in product j, so that the four lanes of a row find the
// scales of their channels in different banks; the query's channels are in this order, too.
// All rows of the query in fp16, 64 channels after another; rows that are not there are 0.
DEV void load_team_query(u32 query, const Params& p, const Segment& seg, const Member& me, int lane) {
  constexpr int PIECES = D / 8, AT_ONCE = 32 * TEAM;
  static_assert(ROWS * PIECES % AT_ONCE == 0, "all lanes have as many");
  uint4 x[ROWS * PIECES / AT_ONCE];  // all are on their way before the first is needed
#pragma unroll
  for (int n = 0; n < ROWS * PIECES / AT_ONCE; n++) {
    const int i = n * AT_ONCE + me.index * 32 + lane, row = i / PIECES;
    x[n] = make_uint4(0, 0, 0, 0);
    if (row < seg.rows) x[n] = __ldg((const uint4*)(p.query + row_offset(p, seg, row, p.query_stride)) + i % PIECES);
  }
#pragma unroll
  for (int n = 0; n < ROWS * PIECES / AT_ONCE; n++) {
    const int i = n * AT_ONCE + me.index * 32 + lane, row = i / PIECES, piece = i % PIECES;
    const u32 to = query + piece / 8 * (128 * ROWS) + row * 128, at = (piece ^ row) & 7;
    sts64(to + at * 16, exact_to_f16(x[n].x), exact_to_f16(x[n].y));
    sts64(to + (at ^ 4) * 16 + 8, exact_to_f16(x[n].z), exact_to_f16(x[n].w));
  }
}

// ---- Products -------------------------------------------------------------------------------------------------------
// As `expand_raw`: the codes of a word, plus constants.
DEV void expand_codes(u32 (&x)[4], u32 w, u32 lower) {
#if CODE_BITS == 4
  expand_raw(x, w, lower);
#else
  const u32 low = bits_of(w << 4, lower, 0xf0f0f0f0), high = bits_of(w, lower >> 4, 0xf0f0f0f0);
  x[0] = __byte_perm(low, 0x64646464, 0x4240);
  x[1] = __byte_perm(high, 0x64646464, 0x4240);
  x[2] = __byte_perm(low, 0x64646464, 0x4341);
  x[3] = __byte_perm(high, 0x64646464, 0x4341);
#endif
}
// Keys: complete.
DEV void expand_keys(u32 (&x)[4], u32 w, u32 lower, const uint4& scale, const uint4& minimum) {
  expand_codes(x, w, lower);
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if CODE_BITS == 4
    x[i] = add_f16x2(x[i], i & 1 ? 0xd400d400 : 0xe400e400);  // - 64, - 1024
#else
    x[i] = fma_f16x2(x[i], 0x2c002c00, 0xd408d408);  // (x - 1024 - 8) / 16
#endif
    x[i] = fma_f16x2(x[i], word(scale, i), word(minimum, i));
  }
}
// Values: half the codes' range below 0 (see `expand_v`), without the token's scale.
DEV void expand_values(u32 (&x)[4], u32 w, u32 lower) {
  expand_codes(x, w, lower);
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = add_f16x2(x[i], i & 1 ? CENTRE1 : CENTRE0);
}

// What a lane reads for one round of products: codes of 32 rows and 32 columns, of both planes.
struct Codes {
  uint4 upper, lower;
  DEV void load(u32 at) { upper = lds128(at), lower = PLANES == 2 ? lds128(at + PAGE_PLANE) : upper; }
};
// [tile of 16 rows][product of 16 columns]
typedef u32 Fragments[2][2][4];

// Keys of this warp's slice, as a lane reads them for its products.
struct Keys {
  Codes next;
  uint4 scale, minimum;
  u32 mine, run;
  DEV void begin(u32 keys, u32 scales, int lane) {
    mine = keys + lane * 16, run = scales + (lane & 3) * (D / 2);
    load(0, lane);
  }
  DEV void load(int j, int lane) {
    const int odd = (lane & 3) / 2, tile = j % 2 ? j - odd : j + odd;  // j ^ odd
    next.load(mine + tile * 512), scale = lds128(run + tile * 16), minimum = lds128(run + tile * 16 + 2 * D);
  }
};

// Scores of this warp's slice. They are there after a wait.
DEV void multiply_keys(float (&s)[NT][2][4], Keys& keys, u32 columns, int lane) {
#pragma unroll
  for (int j = 0; j < J; j++) {
    const Codes codes = keys.next;
    const uint4 scale = keys.scale, minimum = keys.minimum;
    if (j + 1 < J) keys.load(j + 1, lane);
    Fragments a;
#pragma unroll
    for (int y = 0; y < 4; y++) {
      u32 x[4];
      expand_keys(x, word(codes.upper, y), word(codes.lower, y), scale, minimum);
#pragma unroll
      for (int i = 0; i < 4; i++) a[y / 2][i / 2][i % 2 * 2 + y % 2] = x[i];
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int product = 2 * j + k;
      const u32 from = columns + (product / 4 * (128 * ROWS) + product % 4 * 32) / 16;
#pragma unroll
      for (int m = 0; m < 2; m++) {
        if (product == 0) wgmma<NT, 8, false>(s[0][m], a[m][k], from);
        else wgmma<NT, 8>(s[0][m], a[m][k], from);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();  // so the fragments before these can be replaced
  }
}

// Values of a slice, those of this warp's channels.
DEV void expand_slice(Fragments& a, const Codes& codes) {
#pragma unroll
  for (int y = 0; y < 4; y++) {
    u32 x[4];
    expand_values(x, word(codes.upper, y), word(codes.lower, y));
#pragma unroll
    for (int e = 0; e < 4; e++) a[y / 2][e / 2][e % 2 * 2 + y % 2] = x[e];
  }
}

// A page's values, those of this warp's channels (`mine`), a slice after another.
struct Values {
  Codes next;
  u32 mine, columns;
  DEV void begin(u32 from, u32 probabilities) { mine = from, columns = probabilities, next.load(mine); }
  // Slice i. The products of the one before are there afterwards, and all that were asked for before those.
  DEV void multiply(State& st, int i) {
    static_assert(OWN_J == 1, "a warp has 32 channels");
    const Codes codes = next;
    if (i + 1 < TEAM) next.load(mine + (i + 1) * PLANE);
    Fragments a;
    expand_slice(a, codes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int m = 0; m < 2; m++)
        wgmma<NT, 4 * OWN_MT>(st.acc[0][m], a[m][k], columns + (i / 2 * (128 * ROWS) + (i % 2 * 2 + k) * 32) / 16);
    wgmma_commit();
    wgmma_wait<1>();
  }
};

DEV void hold_scores(float (&s)[NT][2][4]) {
#pragma unroll
  for (int m = 0; m < 2; m++) hold<NT, 8>(s[0][m]);
}
DEV void finish_values(State& st) {
  wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < OWN_MT; m++) hold<NT, 4 * OWN_MT>(st.acc[0][m]);
}

// What a lane needs of its warp's slice beside scores, for tokens 8*i + g; zeros where the warp has no slice.
struct Tokens {
  u32 scale[4];  // twice
  float constant[4];  // what a code of 0 stands for after centring
  DEV void load(u32 scales, bool has, int lane) {
    const int g = lane >> 2;
    const u32 at = scales + g / 2 * (G / 2);
    const uint4 none = make_uint4(0, 0, 0, 0), s = has ? lds128(at) : none, z = has ? lds128(at + 2 * G) : none;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      scale[i] = __byte_perm(word(s, i), 0, g % 2 ? 0x3232 : 0x1010);
      constant[i] = half_of(fma_f16x2(HALF_RANGE, word(s, i), word(z, i)), g % 2);
    }
  }
};

// Where a lane has 8 tokens of its warp's slice in the probabilities: piece lane / 8, row lane % 8 of each row tile.
DEV u32 own_probabilities(u32 prob, const Member& me, int lane) {
  const int piece = me.index % 2 * 4 + (lane >> 3);
  return prob + me.index / 2 * (128 * ROWS) + (lane & 7) * 128 + ((piece ^ lane) & 7) * 16;
}

// Scores of this warp's slice to probabilities, with the scales of its tokens.
DEV void leave_probabilities(State& st, const float (&s)[NT][2][4], const Tokens& tokens, u32 prob, float scale,
                             const Member& me, int lane) {
  const u32 to = own_probabilities(prob, me, lane);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    u32 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float p[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        p[e] = exp2_fast(fmaf(s[n][i / 2][i % 2 * 2 + e], scale, -st.top[n][e]));
        st.sums[n][0][2 + e] += p[e];
        st.sums[n][0][e] = fmaf(p[e], tokens.constant[i], st.sums[n][0][e]);
      }
      x[i] = mul_f16x2(pack_f16(p[0], p[1]), tokens.scale[i]);
    }
    sts128_trans(to + n * 1024, x[0], x[1], x[2], x[3]);
  }
}

// A larger `top` (`raise_together`), when probabilities that are relative to the one before wait for their values.
DEV void raise_under_probabilities(State& st, const float (&s)[NT][2][4], float scale, u32 prob, u32 shared,
                                   const Member& me, int lane) {
  float high[NT][2], top[NT][2];
  above_top(high, st, s, scale);
#pragma unroll
  for (int n = 0; n < NT; n++) top[n][0] = st.top[n][0], top[n][1] = st.top[n][1];
  raise_together(st, high, shared, me, lane);
  const u32 at = own_probabilities(prob, me, lane);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float x = exp2_fast(top[n][0] - st.top[n][0]), y = exp2_fast(top[n][1] - st.top[n][1]);
    const u32 both = __shfl_sync(ALL, pack_f16(x, y), (lane & 7) / 2);
    const u32 factor = __byte_perm(both, 0, lane % 2 ? 0x3232 : 0x1010);
    const uint4 q = lds128(at + n * 1024);
    sts128(at + n * 1024,
           make_uint4(mul_f16x2(q.x, factor), mul_f16x2(q.y, factor), mul_f16x2(q.z, factor), mul_f16x2(q.w, factor)));
  }
  fence_shared();
  team_sync(me);
}

// Whether one of a lane's scores is above `top` by more than ROOM (`above_top`); `inverse` of the scores' scale.
DEV bool exceeds_top(const State& st, const float (&s)[NT][2][4], float inverse) {
  bool raise = false;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      raise |= fmaxf(fmaxf(s[n][0][e], s[n][0][e + 2]), fmaxf(s[n][1][e], s[n][1][e + 2])) >
               fmaf(st.top[n][e], inverse, ROOM * inverse);
  return raise;
}

// ---- The pages of a segment -----------------------------------------------------------------------------------------
DEV void attend_pages(State& st, const Params& p, const Segment& seg, const Part& part, Pages& r, u32 ring, u32 shared,
                      const Member& me, int lane) {
  const int slice_b = part.slice_b, slice_e = r.slice_e, step_b = slice_b / TEAM, step_e = (slice_e + TEAM - 1) / TEAM;
  const unsigned char* pool = p.pages + seg.head * p.head_stride;
#if SCORES
  const int scored_at = p.num_scored[seg.request] > 0 ? p.begin[seg.request] : -1;
#endif
  const u32 keys = ring + me.index * PLANE, values = ring + RING_V + me.index * 512 + lane * 16;
  const u32 barriers = shared + TEAM_BARRIERS;  // of each stage, its keys' and its values'
  auto scales_of = [&](int step) { return ring + RING_SCALES + step % SCALE_STEPS * PAGE_SCALES; };

  // A warp asks for one of the planes of a page: of keys, two steps before those of the same page's values, or of values.
  // What a page lacks at the segment's ends stays what it was, codes of any numbers.
  const bool of_values = me.index >= TEAM / 2, asks = PLANES == 2 || me.index % 2 == 0;
  const u32 to = ring + (of_values ? RING_V : 0) + me.index % 2 * PAGE_PLANE;
  const unsigned char* from = pool + (me.index % 2 ? K_LOWER : K_UPPER) + (of_values ? V_UPPER - K_UPPER : 0);
  static_assert(V_LOWER - K_LOWER == V_UPPER - K_UPPER, "planes of values follow those of keys");
  int asked = step_b;  // the next page that this warp asks for
  const unsigned char* next = from;  // its plane
  auto find = [&](int id) { next = from + id * p.page_stride; };
  auto ask = [&](int stage) {
    if (asks && asked < step_e) {
      const u32 barrier = barriers + stage * 16 + of_values * 8;
      const int first = max(slice_b - asked * TEAM, 0) * PLANE, bytes = min(slice_e - asked * TEAM, TEAM) * PLANE - first;
      if (elected()) {
        arrive_expecting(barrier, bytes + (me.index == 0 ? PAGE_SCALES : 0));
        copy_bulk(to + stage * PAGE_CODES + first, next + first, bytes, barrier);
        if (me.index == 0) copy_bulk(scales_of(asked), next + K_SCALE - K_UPPER, PAGE_SCALES, barrier);
      }
      asked++;
    }
  };

  fence_shared();  // what was written to the ring is there before copies are
  team_sync(me);
  if (me.index == 0 && lane == 0) {
#pragma unroll
    for (int i = 0; i < 2 * STEPS; i++) barrier_init(barriers + i * 8, PLANES);
    fence_shared();
  }
  team_sync(me);
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    find(__shfl_sync(ALL, r.ids.ids, i));
    if (!of_values || i < STEPS - 2) ask(i);
  }
  int id = __shfl_sync(ALL, r.ids.ids, of_values ? STEPS - 2 : STEPS);  // of the next page
  load_team_query(shared, p, seg, me, lane);
#pragma unroll
  for (int n = 0; n < NT; n++)
    sts128(own_probabilities(shared + TEAM_PROB + (PROB_BUFFERS - 1) * PROB, me, lane) + n * 1024, make_uint4(0, 0, 0, 0));
  fence_shared();
  team_sync(me);

  int stage = 0, before = STEPS - 1;  // of this step, of the one before
  u32 parity = 0, parity_before = 0, prob = shared + TEAM_PROB, prob_before = prob + (PROB_BUFFERS - 1) * PROB;
  const float inverse = 1.f / p.scale;
  Values v;
  // A descriptor is the same in all lanes, which the compiler sees by where it comes from.
  auto begin_values = [&] { v.begin(values + before * PAGE_CODES, __shfl_sync(ALL, columns_at(prob_before), 0)); };
#pragma unroll 1
  for (int step = step_b; step < step_e; step++) {
    const int slice = step * TEAM + me.index;
    const bool has = slice >= slice_b && slice < slice_e;  // this warp has a slice of this step
    float s[NT][2][4];
    find(id);
    compute_here(next);
    wait_for(barriers + stage * 16, parity);
    Keys k;
    k.begin(keys + stage * PAGE_CODES, scales_of(step), lane);
    multiply_keys(s, k, __shfl_sync(ALL, columns_at(shared), 0), lane);
    // Of what is before the first step probabilities are 0.
    if (step > step_b) wait_for(barriers + before * 16 + 8, parity_before);
    begin_values();
    wgmma_wait<0>();
    hold_scores(s);
    const int token = has ? (slice + part.skipped) * 32 : 1 << 29;
    if (token + 32 > r.low) mask_slice(s, seg, token, r.exact_start, lane);
    fence_shared();
    const bool raise = team_any(me, exceeds_top(st, s, inverse));
    ask(of_values ? (before == 0 ? STEPS - 1 : before - 1) : stage);
    id = page_id(p, seg, r.ids.table, asked, r.ids.last_page);
    if (raise) {
      finish_values(st);  // done already, but ptxas orders the rest better with it
      raise_under_probabilities(st, s, p.scale, prob_before, shared, me, lane);
    }
    Tokens tokens;
    tokens.load(scales_of(step) + 4 * D + me.index * 16, has, lane);
#pragma unroll
    for (int i = 0; i < TEAM; i++) v.multiply(st, i);
    if (PROB_BUFFERS == 1) {
      finish_values(st);
      team_sync(me);
    }
    leave_probabilities(st, s, tokens, prob, p.scale, me, lane);
    finish_values(st);
#if SCORES
    const int page_b = max(slice_b, step * TEAM), page_e = min(slice_e, step * TEAM + TEAM);
    if (page_b < part.plain && scored_at >= 0) {
      const bool whole = page_e == step * TEAM + TEAM;
      emit(st, p, seg, scored_at + step, slice_b > step * TEAM, (slice_b == step * TEAM) | whole << 1, shared, me, lane);
    }
#endif
    before = stage, parity_before = parity;
    if (++stage == STEPS) stage = 0, parity ^= 1;
    const u32 x = prob;
    prob = prob_before, prob_before = x;
  }
  fence_shared();
  wait_for(barriers + before * 16 + 8, parity_before);
  begin_values();
  team_sync(me);
#pragma unroll
  for (int i = 0; i < TEAM; i++) v.multiply(st, i);
  finish_values(st);
  team_sync(me);
  if (me.index == 0 && lane == 0)
#pragma unroll
    for (int i = 0; i < 2 * STEPS; i++) barrier_end(barriers + i * 8);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) st.sums[n][0][i] = sum_of_rows(st.sums[n][0][i]);
}
