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

constexpr int OWN_J = J / TEAM, STEPS = S / TEAM, PER = G / 32;
static_assert(NW % TEAM == 0 && J % TEAM == 0 && PER % TEAM == 0 && S % TEAM == 0 && STEPS >= 2, "a step is of one page");
static_assert(TEAM * 256 * NT <= QUERY, "probabilities of exact tokens lie where the scaled query was");

DEV void team_sync(const Member& me) { asm volatile("bar.sync %0,%1;" ::"r"(1 + me.team), "n"(32 * TEAM) : "memory"); }
DEV bool team_any(const Member& me, bool x) {
  u32 r;
  asm volatile("{.reg .pred p,q;\n setp.ne.u32 p,%1,0;\n bar.red.or.pred q,%2,%3,p;\n selp.u32 %0,1,0,q;}"
               : "=r"(r)
               : "r"((u32)x), "r"(1 + me.team), "n"(32 * TEAM)
               : "memory");
  return r;
}
DEV u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
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

// One `top` for the team, which nobody raises alone. `has`: this warp has scores. Ends with all warps in step.
template <int N>
DEV void raise_team_top(State& st, const float (&s)[NT][N][4], float scale, bool has, u32 shared, const Member& me, int lane) {
  float high[NT][2];
  if (!team_any(me, above_top(high, st, s, scale, has))) return;
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

// The query times a page's key scales, and its products with the minima: each warp for its share of the channels.
DEV void scale_team_query(u32 stage, u32 shared, const Member& me, int lane) {
  const int t = lane & 3;
  float minima[NT][4], bias[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) minima[n][i] = bias[n][i] = 0.f;
#pragma unroll
  for (int i = 0; i < OWN_J; i++) {
    const int j = me.index * OWN_J + i;
    const uint4 s = lds128(stage + ST_KS + t * (D / 2) + j * 16), z = lds128(stage + ST_KS + 2 * D + t * (D / 2) + j * 16);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const u32 at = shared + ((n * J + j) * 32 + lane) * 16;
      const uint4 q = lds128(at);
      const uint4 x = make_uint4(mul_f16x2(q.x, s.x), mul_f16x2(q.y, s.y), mul_f16x2(q.z, s.z), mul_f16x2(q.w, s.w));
      sts128(at + TEAM_SCALED, x);
      mma_f16(minima[n], z.x, z.x, z.y, z.y, q.x, q.y);
      mma_f16(bias[n], K_BIAS, K_BIAS, K_BIAS, K_BIAS, x.x, x.y);
      mma_f16(minima[n], z.z, z.z, z.w, z.w, q.z, q.w);
      mma_f16(bias[n], K_BIAS, K_BIAS, K_BIAS, K_BIAS, x.z, x.w);
    }
  }
  if (lane < 4)
#pragma unroll
    for (int n = 0; n < NT; n++)
      sts_float2(shared + TEAM_START + (me.index * ROWS + n * 8 + 2 * t) * 4, minima[n][0] * CODE_SCALE - bias[n][0],
                 minima[n][1] * CODE_SCALE - bias[n][1]);
}

// A slice's keys times all rows of the query.
DEV void score_slice(float (&s)[NT][2][4], u32 stage, u32 shared, int lane) {
  const u32 mine = stage + lane * 16, scaled = shared + TEAM_SCALED + lane * 16;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float2 start = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < TEAM; w++) {
      const float2 x = lds_float2(shared + TEAM_START + (w * ROWS + n * 8 + 2 * (lane & 3)) * 4);
      start.x += x.x, start.y += x.y;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) s[n][i / 4][i % 4] = i & 1 ? start.y : start.x;
  }
#pragma unroll
  for (int j = 0; j < J; j++) {
    const uint4 w = lds128(mine + j * 512), low = PLANES == 2 ? lds128(mine + PLANE + j * 512) : w;
    u32 a[2][4], b[2][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
      expand_k(a[m], word(w, 2 * m), word(low, 2 * m));
      expand_k(b[m], word(w, 2 * m + 1), word(low, 2 * m + 1));
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 q = lds128(scaled + (n * J + j) * 512);
#pragma unroll
      for (int m = 0; m < 2; m++) mma_f16(s[n][m], a[m][0], b[m][0], a[m][1], b[m][1], q.x, q.y);
#pragma unroll
      for (int m = 0; m < 2; m++) mma_f16(s[n][m], a[m][2], b[m][2], a[m][3], b[m][3], q.z, q.w);
    }
  }
}

// Where a step's probabilities of a slice lie: over its keys' codes, which are done with, if those are enough.
DEV u32 probabilities(u32 stages, u32 shared, int slice, int group, int n) {
  return (PROB_IN_RING ? stages + slice * STAGE : shared + TEAM_PROB + slice * NVG * NT * 512) + (group * NT + n) * 512;
}

// Scores to probabilities, times the value scales of each group, for the team; their sums stay here.
DEV void leave_probabilities(State& st, const float (&s)[NT][2][4], u32 stages, u32 shared, float scale, const Member& me,
                             int lane) {
  const int t = lane & 3;
  const u32 stage = stages + me.index * STAGE;
  u32 prob[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      prob[n][i] = transpose8x8(pack_f16(exp2_fast(fmaf(s[n][i / 2][(i & 1) * 2], scale, -st.top[n][0])),
                                         exp2_fast(fmaf(s[n][i / 2][(i & 1) * 2 + 1], scale, -st.top[n][1]))));
#pragma unroll
  for (int v = 0; v < NVG; v++) {
    const uint4 vs = lds128(stage + ST_VS + (v * 4 + t) * 16), low = lds128(stage + ST_VS + 64 * NVG + (v * 4 + t) * 16);
    u32 vz[4];  // a code of 0 after centring
#pragma unroll
    for (int i = 0; i < 4; i++) vz[i] = fma_f16x2(HALF_RANGE, word(vs, i), word(low, i));
    const u32 one = v == 0 ? 0x3c003c00 : 0;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float sums[4] = {0.f, 0.f, 0.f, 0.f};
      u32 scaled[4];
      mma_f16(sums, vz[0], one, vz[1], one, prob[n][0], prob[n][1]);
      mma_f16(sums, vz[2], one, vz[3], one, prob[n][2], prob[n][3]);
#pragma unroll
      for (int i = 0; i < 4; i++) scaled[i] = mul_f16x2(prob[n][i], word(vs, i));
      sts128(probabilities(stages, shared, me.index, v, n) + lane * 16, make_uint4(scaled[0], scaled[1], scaled[2], scaled[3]));
#pragma unroll
      for (int i = 0; i < 4; i++) st.sums[n][v][i] += sums[i];
    }
  }
}

// A slice's values, those of this warp's channels.
DEV void add_values(State& st, u32 stages, u32 shared, int slice, const Member& me, int lane) {
#pragma unroll
  for (int i = 0; i < OWN_J; i++) {
    const int j = me.index * OWN_J + i;
    const u32 mine = stages + slice * STAGE + ST_V + j * 512 + lane * 16;
    const uint4 w = lds128(mine), low = PLANES == 2 ? lds128(mine + PLANE) : w;
    u32 a[2][4], b[2][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
      expand_v(a[m], word(w, 2 * m), word(low, 2 * m));
      expand_v(b[m], word(w, 2 * m + 1), word(low, 2 * m + 1));
    }
    const u32 from = probabilities(stages, shared, slice, j * 32 / VALUE_GROUP_SIZE, 0) + lane * 16;
    static_assert(VALUE_GROUP_SIZE % 32 == 0, "32 channels are of one group");
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 q = lds128(from + n * 512);
#pragma unroll
      for (int m = 0; m < 2; m++) mma_f16(st.acc[n][2 * i + m], a[m][0], b[m][0], a[m][1], b[m][1], q.x, q.y);
#pragma unroll
      for (int m = 0; m < 2; m++) mma_f16(st.acc[n][2 * i + m], a[m][2], b[m][2], a[m][3], b[m][3], q.z, q.w);
    }
  }
}

// ---- 16 exact tokens of each warp -----------------------------------------------------------------------------------
DEV void score_window(float (&s)[NT][1][4], u32 stage, const Params& p, const Segment& seg, int token, int exact_start,
                      int lane) {
  const int g = lane >> 2, t = lane & 3;
  const u32 key = stage + (lane & 15) * WIN_ROW + (lane >> 4) * 16;
  u32 a[MT][4];
#pragma unroll
  for (int x = 0; x < MT; x++) ldmatrix(a[x], key + x * 32);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    u32 q[MT][2];
    load_query_tile(q, n, p, seg, lane);
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][0][i] = 0.f;
#pragma unroll
    for (int x = 0; x < MT; x++) mma_exact(s[n][0], a[x][0], a[x][1], a[x][2], a[x][3], q[x][0], q[x][1]);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int from, position;
      row_bounds(p, seg, n * 8 + 2 * t + e, exact_start, from, position);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int j = token + i * 8 + g;
        if (j < from || j > position) s[n][0][i * 2 + e] = -__int_as_float(0x7f800000);
      }
    }
  }
}

DEV u32 exact_probabilities(u32 shared, int tile, int n) { return shared + TEAM_SCALED + (tile * NT + n) * 256; }

DEV void leave_exact_probabilities(State& st, const float (&s)[NT][1][4], u32 shared, float scale, const Member& me, int lane) {
  constexpr float SHIFT = CODE_BITS == 4 ? 0.f : 4.f;  // everything that ends up in acc is in units of 1 / CODE_SCALE
  const u32 unit = pack_exact(1.f / CODE_SCALE, 1.f / CODE_SCALE);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    u32 prob[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      prob[i] = transpose8x8(pack_exact(exp2_fast(fmaf(s[n][0][2 * i], scale, SHIFT - st.top[n][0])),
                                        exp2_fast(fmaf(s[n][0][2 * i + 1], scale, SHIFT - st.top[n][1]))));
    mma_exact(st.sums[n][0], 0, unit, 0, unit, prob[0], prob[1]);
    sts64(exact_probabilities(shared, me.index, n) + lane * 8, prob[0], prob[1]);
  }
}

DEV void add_exact_values(State& st, u32 stage, u32 shared, int tile, const Member& me, int lane) {
  const u32 value = stage + 2 * D + me.index * OWN_MT * 32 + ((lane & 7) + (lane >> 4) * 8) * WIN_ROW + ((lane >> 3) & 1) * 16;
  u32 a[OWN_MT][4];
#pragma unroll
  for (int mt = 0; mt < OWN_MT; mt++) ldmatrix_trans(a[mt], value + mt * 32);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint2 q = lds64(exact_probabilities(shared, tile, n) + lane * 8);
#pragma unroll
    for (int mt = 0; mt < OWN_MT; mt++) mma_exact(st.acc[n][mt], a[mt][0], a[mt][1], a[mt][2], a[mt][3], q.x, q.y);
  }
}

// ---- A team's part of a segment -------------------------------------------------------------------------------------
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
// As of one warp, see there; the team's sums meet where its largest scores do.
DEV void emit(const State& st, const Params& p, const Segment& seg, int slot, int part, int flags, u32 shared, const Member& me,
              int lane) {
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
  const int entry = start / WINDOW_BLOCK + lane;
  int window_id = 0;
  if (entry <= seg.last / WINDOW_BLOCK)
    window_id = __ldg(p.window_block_table + (i64)seg.request * p.window_table_stride + entry);
  const u32 missing = __ballot_sync(ALL, window_id <= 0 && entry * WINDOW_BLOCK < seg.first);
  int exact_start = start;
  if (missing) exact_start = min(seg.first, (start / WINDOW_BLOCK + 32 - __clz(missing)) * WINDOW_BLOCK);
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
      commit();
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
      wait<STEPS - 2>();
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
        const int token = (slice + part.skipped) * 32;  // of the list: a smaller one than it has, and read by every row as well
        if (token + 32 > low) mask_slice(s, p, seg, token, exact_start, lane);
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
    wait<0>();
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
      commit();
    };
    load_next(0);
    int half = 0;
    for (int first = token_b; first < token_e; first += 16 * TEAM) {
      const int token = first + me.index * 16;
      const u32 stages = ring + half * TEAM * WIN_STAGE;
      wait<0>();
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
    wait<0>();
  }
  add_sums(st, ring, me, lane);
}
