// Attention of a few query tokens per request over quantized pages and the exact recent window. Compiled by NVRTC.
//
// Tokens are the M dimension of mma.m16n8k16 and query rows (query token x head of the GQA group) its N = 8: a lane's
// 16-byte load holds its own A fragments (see vllm_quantspec/format.py), and a tile wastes at most 7 rows. Scales
// multiply the query (keys) and the probabilities (values), minima are one more product, so that a code costs less than
// one instruction.
//
// Every warp streams its own slices of 32 tokens through a private ring in shared memory (cp.async), so the bytes in
// flight do not depend on registers, and no warp waits for another before the end. (More query rows than a warp has registers
// for are a team of warps' work, which stands for the warp in all of this: decode_attention_team.cuh.) Work is one line of
// units, cut evenly over the grid:
//     request -> KV head -> row tile -> [slices of pages below window_start(first position)] [slices from there to the
//     last position]
// A segment (request, head, row tile) cut between warps is merged through shared memory. One cut between CTAs is merged
// through the workspace: its CTAs wait for each other, then each merges a part of the output. One CTA per
// multiprocessor and no more CTAs than those, so all of them are running or will be.
//
// The launch overlaps with its predecessor (programmatic dependent launch): the query, lengths, tables and, unless
// PAGES_MAY_CHANGE, pages are read before the wait; the window is read and everything is written after it. (The target's
// predecessor may complete pages that a request which shares them reads in the same step.) The successor is released after
// the wait, so that a kernel that runs ahead finds all but its direct predecessor complete.
//
// Macros: HEAD_SIZE GROUP_SIZE VALUE_GROUP_SIZE WINDOW_BLOCK CODE_BITS (4 or 8, read of each code) IS_BF16 WARPS STAGES
//         TEAM (warps that share slices: 1, 2 or 4) QUERY_GROUP (query heads per KV head) ROW_TILES (of 8 rows, in one pass) PASSES (row tiles' passes)
//         PAGES_MAY_CHANGE (the kernel before this one may write pages)
//         SCORES (leave the attention mass of every old page, see `emit`), LISTS (read chosen pages only, see `page_id`)

#include "ptx.cuh"

constexpr int D = HEAD_SIZE, G = GROUP_SIZE, NT = ROW_TILES, NW = WARPS, S = STAGES;
constexpr int TEAMS = NW / TEAM, OWN_MT = D / 16 / TEAM;  // tiles of 16 channels whose output a warp sums
constexpr int ROWS = 8 * NT, J = D / 32, MT = D / 16, NVG = D / VALUE_GROUP_SIZE, THREADS = 32 * NW;
constexpr u32 ALL = 0xffffffffu;

// One head's bytes in a page.
constexpr int K_UPPER = 0, V_UPPER = G * D / 2, K_SCALE = G * D, V_SCALE = K_SCALE + 4 * D;
constexpr int K_LOWER = V_SCALE + 4 * NVG * G, V_LOWER = K_LOWER + G * D / 2;

// One stage of a warp's ring: a slice of 32 tokens, and the key scales when the slice is the first of its page.
constexpr int PLANE = 512 * J, PLANES = CODE_BITS / 4;
constexpr int ST_V = PLANES * PLANE, ST_VS = 2 * PLANES * PLANE, ST_KS = ST_VS + 128 * NVG, STAGE = ST_KS + 4 * D;
constexpr int WIN_ROW = 4 * D + 16, WIN_STAGE = 16 * WIN_ROW;  // 16 exact tokens; the padding avoids bank conflicts
constexpr int PART = 4 * ROWS * (D + 4);  // a warp's unnormalized output
constexpr int RING_MIN = 2 * TEAM * WIN_STAGE > PART ? 2 * TEAM * WIN_STAGE : PART,
              RING = S * STAGE > RING_MIN ? S * STAGE : RING_MIN;
constexpr int WIN_STAGES = RING >= 3 * WIN_STAGE ? 3 : 2;
constexpr int QUERY = 16 * D * NT;  // fp16 query fragments
// What a team shares beside its ring: fragments of the scaled query, its products with minima, a slice's largest scores and
// probabilities.
constexpr int TEAM_SCALED = QUERY, TEAM_START = TEAM_SCALED + QUERY, TEAM_HIGH = TEAM_START + 4 * ROWS * TEAM,
              TEAM_PROB = TEAM_HIGH + 4 * ROWS * TEAM;
constexpr bool PROB_IN_RING = NVG * NT * 512 <= PLANES * PLANE;
constexpr int TEAM_SHARED = TEAM_PROB + (PROB_IN_RING ? 0 : TEAM * NVG * NT * 512);
constexpr int TEAM_BYTES = RING + (TEAM == 1 ? QUERY : TEAM_SHARED);
constexpr int MAX_CHUNKS = 32;  // of 32 requests

// In slices of 32 quantized tokens: what 16 exact tokens cost, and a segment's merge.
constexpr int WINDOW_COST = 2, SEGMENT_COST = 8;
constexpr float CODE_SCALE = CODE_BITS == 4 ? 1.f : 16.f;  // codes are in units of scale / CODE_SCALE
constexpr float NEVER = -1e30f, HEADROOM = 3.f;  // probabilities stay below 2^(2 * HEADROOM)

extern __shared__ __align__(128) unsigned char smem[];

// ---- PTX ------------------------------------------------------------------------------------------------------------
DEV void sts128(u32 a, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEV void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEV void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
DEV void mma_f16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV void mma_exact(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if IS_BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  mma_f16(c, a0, a1, a2, a3, b0, b1);
#endif
}
DEV void ldmatrix(u32* r, u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a));
}
DEV void ldmatrix_trans(u32* r, u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a));
}
DEV u32 transpose8x8(u32 x) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(x));
  return r;
}
DEV u32 pack_f16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEV u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEV u32 mul_f16x2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEV u32 add_f16x2(u32 a, u32 b) {
  u32 r;
  asm("add.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEV float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
DEV u32 pack_exact(float low, float high) { return IS_BF16 ? pack_bf16(low, high) : pack_f16(low, high); }
DEV u32 exact_to_f16(u32 x) {
  return IS_BF16 ? pack_f16(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)) : x;
}

// ---- Codes to fp16 --------------------------------------------------------------------------------------------------
// x[par * 2 + b] is the pair e = 0, 1 of the word's codes as fp16. Bits ORed into the mantissa of 1024 (bits 0-3) or 64
// (bits 4-7) cost no conversion but add that constant. Keys keep a constant, K_BIAS: their sums start from 0 at every
// slice. Values are centred (half the codes' range is subtracted, and added to the minimum): sums over a long context
// stay small, so that the tensor core's truncation of fp32 sums does not drift.
#if CODE_BITS == 4
DEV void expand_raw(u32 (&x)[4], u32 w, u32) {
  const u32 v = w >> 8;
  x[0] = and_or<0x000f000f, 0x64006400>(w);
  x[1] = and_or<0x00f000f0, 0x54005400>(w);
  x[2] = and_or<0x000f000f, 0x64006400>(v);
  x[3] = and_or<0x00f000f0, 0x54005400>(v);
}
constexpr u32 K_BIAS = 0x54005400, TO_K_BIAS = 0xe380e380;  // 64, -960
constexpr u32 CENTRE0 = 0xe408e408, CENTRE1 = 0xd480d480;  // -1032, -72
DEV void expand_k(u32 (&x)[4], u32 w, u32) {
  expand_raw(x, w, 0);
  x[0] = add_f16x2(x[0], TO_K_BIAS), x[2] = add_f16x2(x[2], TO_K_BIAS);
}
#else
DEV void expand_raw(u32 (&x)[4], u32 w, u32 lower) {
  const u32 b0 = ((w << 4) & 0xf0f0f0f0) | (lower & 0x0f0f0f0f), b1 = (w & 0xf0f0f0f0) | ((lower >> 4) & 0x0f0f0f0f);
  x[0] = __byte_perm(b0, 0x64646464, 0x4240);
  x[1] = __byte_perm(b1, 0x64646464, 0x4240);
  x[2] = __byte_perm(b0, 0x64646464, 0x4341);
  x[3] = __byte_perm(b1, 0x64646464, 0x4341);
}
constexpr u32 K_BIAS = 0x64086408;                               // 1024 + 8, since lower codes are stored + 8
constexpr u32 CENTRE0 = 0xe488e488, CENTRE1 = CENTRE0;           // -(1024 + 8 + 128)
DEV void expand_k(u32 (&x)[4], u32 w, u32 lower) { expand_raw(x, w, lower); }
#endif
constexpr u32 HALF_RANGE = 0x48004800;  // 8 scales: what centring took off
DEV void expand_v(u32 (&x)[4], u32 w, u32 lower) {
  expand_raw(x, w, lower);
  x[0] = add_f16x2(x[0], CENTRE0), x[2] = add_f16x2(x[2], CENTRE0);
  x[1] = add_f16x2(x[1], CENTRE1), x[3] = add_f16x2(x[3], CENTRE1);
}

// ---- The running softmax of a warp ----------------------------------------------------------------------------------
// Lane 4*g+t holds rows 8*nt + 2t + {0, 1}: element [..][0..1] of output channel 16*mt + g, [2..3] of channel 16*mt + 8
// + g.
struct State {
  float acc[NT][OWN_MT][4];  // sum of p * scale * centred code
  float sums[NT][NVG][4];  // [0..1] sum of p * (minimum + 8 * scale), [2..3] (group 0) sum of p
  float top[NT][2];  // p = 2^(score - top)
};

DEV void reset(State& st) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    st.top[n][0] = st.top[n][1] = NEVER;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int m = 0; m < OWN_MT; m++) st.acc[n][m][i] = 0.f;
#pragma unroll
      for (int v = 0; v < NVG; v++) st.sums[n][v][i] = 0.f;
    }
  }
}

DEV float max_of_rows(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 4));
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 8));
  return fmaxf(x, __shfl_xor_sync(ALL, x, 16));
}

// A row tile's `top`, where its largest score is above it by more than the headroom.
DEV void rescale(State& st, int n, const float (&high)[2]) {
  float factor[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float top = high[e] > st.top[n][e] + 2 * HEADROOM ? high[e] - HEADROOM : st.top[n][e];
    factor[e] = exp2_fast(st.top[n][e] - top);
    st.top[n][e] = top;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int m = 0; m < OWN_MT; m++) st.acc[n][m][i] *= factor[i & 1];
#pragma unroll
    for (int v = 0; v < NVG; v++) st.sums[n][v][i] *= factor[i & 1];
  }
}

// The largest of a lane's scores in each row, if it has any; whether one is above `top` by more than the headroom.
template <int N>
DEV bool above_top(float (&high)[NT][2], const State& st, const float (&s)[NT][N][4], float scale, bool has = true) {
  bool raise = false;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float x = fmaxf(s[n][0][e], s[n][0][e + 2]);
#pragma unroll
      for (int i = 1; i < N; i++) x = fmaxf(x, fmaxf(s[n][i][e], s[n][i][e + 2]));
      high[n][e] = has ? x * scale : NEVER;
      raise |= high[n][e] > st.top[n][e] + 2 * HEADROOM;
    }
  return raise;
}

// Raise `top` where a score exceeds it by more than the headroom: after the first slices hardly ever.
template <int N>
DEV void raise_top(State& st, const float (&s)[NT][N][4], float scale) {
  float high[NT][2];
  if (!__any_sync(ALL, above_top(high, st, s, scale))) return;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float x[2];
#pragma unroll
    for (int e = 0; e < 2; e++) x[e] = max_of_rows(high[n][e]);
    rescale(st, n, x);
  }
}

// A warp's place: its team in the CTA, and which of the team it is.
struct Member {
  int team, index;
};

// ---- What a segment is ----------------------------------------------------------------------------------------------
struct Segment {
  int begin, end;  // units on the line
  int request, head, tile;
  int first, last;  // positions of the first and the last query token
  int token, rows;  // first query token's index, rows of this row tile
  int chosen, dense;  // LISTS: pages read from the list, and the page from which on all are read
};

struct Params {
  const u16* query;
  const unsigned char* pages;
  const unsigned char* window;
  const int *query_start_loc, *seq_lens, *block_table, *window_block_table;
  u16* out;
  float* partial;
  float* spill;
  int* arrived;
  i64 query_stride, out_stride, page_stride, head_stride, window_stride,
      window_head_stride;  // tokens: elements, pools: bytes
  int block_table_stride, window_table_stride, num_requests, num_heads, min_units;
  float scale;  // softmax scale * log2(e)
  // SCORES
  int raw_rows;
  float2* raw;  // [slot][head][part][raw_rows]
  unsigned char* raw_flags;  // [slot][head][raw_rows / 8]
  float* lse;  // [token][head * QUERY_GROUP]
  const int *begin, *num_scored;  // [request]
  // LISTS
  const int *page_list, *list_begin, *list_count, *dense_from;  // [head][slot], [request] each
  i64 list_stride;
};

DEV int window_start(int position) {  // format.window_start
  const int page = position / G - 1;
  return page > 0 ? page * G : 0;
}

// Units of one (head, row tile) of a request: at least one, so that every output row is written. `skipped` old pages are
// not read.
DEV int units_of(int first, int last, int skipped) {
  if (last < first || first < 0) return 1;
  const int start = window_start(first);
  return start / 32 - skipped * (G / 32) + WINDOW_COST * ((last - start) / 16 + 1) + SEGMENT_COST;
}

__shared__ int prefix[MAX_CHUNKS * 32], chunk_begin[MAX_CHUNKS + 1];

struct Request {
  int token, queries, length, units, chosen, dense;
};

DEV Request request_at(const Params& p, int r) {
  Request x;
  x.token = p.query_start_loc[r], x.queries = p.query_start_loc[r + 1] - x.token, x.length = p.seq_lens[r];
  x.chosen = x.dense = 0;
#if LISTS
  const int chosen = p.list_count[r], dense = p.dense_from[r];
  // What a padded row of a CUDA graph has is another request's.
  if (0 < chosen && chosen <= dense && dense * G <= window_start(x.length - x.queries)) x.chosen = chosen, x.dense = dense;
#endif
  x.units = units_of(x.length - x.queries, x.length - 1, x.dense - x.chosen);
  return x;
}

DEV int inclusive_scan(int x, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int y = __shfl_up_sync(ALL, x, d);
    if (lane >= d) x += y;
  }
  return x;
}

// Where each request's units begin (prefix + chunk_begin); returns the total.
DEV int scan_requests(const Params& p, int warp, int lane) {
  const int chunks = (p.num_requests + 31) / 32, per = p.num_heads * PASSES;
  for (int c = warp; c < chunks; c += NW) {
    const int r = c * 32 + lane;
    const int mine = r < p.num_requests ? request_at(p, r).units * per : 0, sum = inclusive_scan(mine, lane);
    prefix[r] = sum - mine;
    if (lane == 31) chunk_begin[c + 1] = sum;
  }
  if (threadIdx.x == 0) chunk_begin[0] = 0;
  __syncthreads();
  if (chunks > 1) {
    if (warp == 0) {
      const int sum = inclusive_scan(lane < chunks ? chunk_begin[lane + 1] : 0, lane);
      __syncwarp();
      if (lane < chunks) chunk_begin[lane + 1] = sum;
    }
    __syncthreads();
  }
  return chunk_begin[chunks];
}

DEV Segment segment_at(const Params& p, int unit) {
  int low = 0, high = p.num_requests;
  while (high - low > 1) {
    const int mid = (low + high) / 2;
    if (prefix[mid] + chunk_begin[mid / 32] <= unit) low = mid;
    else high = mid;
  }
  const Request r = request_at(p, low);
  Segment s;
  s.request = low, s.token = r.token;
  s.first = r.length - r.queries, s.last = r.length - 1;
  s.chosen = r.chosen, s.dense = r.dense;
  const int begin = prefix[low] + chunk_begin[low / 32], index = (u32)(unit - begin) / (u32)r.units;
  s.begin = begin + index * r.units, s.end = s.begin + r.units;
  s.head = (u32)index / PASSES, s.tile = index - s.head * PASSES;
  s.rows = min(ROWS, r.queries * QUERY_GROUP - s.tile * ROWS);
  return s;
}

// Element offset of a row of a segment's tile, in a tensor [token, head, channel].
DEV i64 row_offset(const Params& p, const Segment& s, int row, i64 stride) {
  const int r = s.tile * ROWS + row, q = (u32)r / QUERY_GROUP;
  return (s.token + q) * stride + (i64)(s.head * QUERY_GROUP + r - q * QUERY_GROUP) * D;
}

// ---- One slice of pages ---------------------------------------------------------------------------------------------
DEV void load_slice(u32 to, const unsigned char* page, int slice, bool key_scales, int lane) {
  const unsigned char* from = page + slice * PLANE + lane * 16;
  to += lane * 16;
#pragma unroll
  for (int j = 0; j < J; j++) {
    copy16(to + j * 512, from + K_UPPER + j * 512);
    copy16(to + ST_V + j * 512, from + V_UPPER + j * 512);
    if (PLANES == 2) {
      copy16(to + PLANE + j * 512, from + K_LOWER + j * 512);
      copy16(to + ST_V + PLANE + j * 512, from + V_LOWER + j * 512);
    }
  }
  if (lane < 8 * NVG) copy16(to + ST_VS, page + V_SCALE + lane * (G / 2) + slice * 16);
  if (key_scales)
#pragma unroll
    for (int i = 0; i < D / 4; i += 32)
      if (i + lane < D / 4) copy16(to + ST_KS + i * 16, page + K_SCALE + (i + lane) * 16);
}

#if TEAM == 1
struct Keys {
  u32 scaled[NT][J][4];  // query * key scale, B fragments of two k-steps per 32 channels
  float start[NT][2];  // query . key minimum, less what the codes' bias adds
};

DEV void scale_query(Keys& k, u32 stage, u32 query, int lane) {
  const int t = lane & 3;
  float minima[NT][4], bias[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) minima[n][i] = bias[n][i] = 0.f;
#pragma unroll
  for (int j = 0; j < J; j++) {
    const uint4 s = lds128(stage + ST_KS + t * (D / 2) + j * 16),
                z = lds128(stage + ST_KS + 2 * D + t * (D / 2) + j * 16);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 q = lds128(query + ((n * J + j) * 32 + lane) * 16);
      u32(&x)[4] = k.scaled[n][j];
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = mul_f16x2(word(q, i), word(s, i));
      mma_f16(minima[n], z.x, z.x, z.y, z.y, q.x, q.y);
      mma_f16(bias[n], K_BIAS, K_BIAS, K_BIAS, K_BIAS, x[0], x[1]);
      mma_f16(minima[n], z.z, z.z, z.w, z.w, q.z, q.w);
      mma_f16(bias[n], K_BIAS, K_BIAS, K_BIAS, K_BIAS, x[2], x[3]);
    }
  }
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) k.start[n][e] = minima[n][e] * CODE_SCALE - bias[n][e];
}

#endif

// Boundaries of a row: it reads pages below `from`, the window in [from, position].
DEV void row_bounds(const Params& p, const Segment& s, int row, int exact_start, int& from, int& position) {
  position = min(s.first + (int)((u32)(s.tile * ROWS + row) / QUERY_GROUP), s.last);
  from = max(window_start(position), exact_start);
}

// Tokens of a slice that a row reads from the window, or not at all.
DEV void mask_slice(float (&s)[NT][2][4], const Params& p, const Segment& seg, int token, int exact_start, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int from, position;
      row_bounds(p, seg, n * 8 + 2 * t + e, exact_start, from, position);
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (token + i * 8 + g >= from) s[n][i / 2][(i & 1) * 2 + e] = -__int_as_float(0x7f800000);
    }
}

#if TEAM == 1
DEV void attend_slice(State& st, const Keys& k, u32 stage, const Params& p, const Segment& seg, int token,
                      int exact_start, bool mask, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const u32 mine = stage + lane * 16;
  float s[NT][2][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 8; i++) s[n][i / 4][i % 4] = k.start[n][i & 1];
#pragma unroll
  for (int j = 0; j < J; j++) {
    const uint4 w = lds128(mine + j * 512), low = PLANES == 2 ? lds128(mine + PLANE + j * 512) : w;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      u32 a[4], b[4];
      expand_k(a, word(w, 2 * m), word(low, 2 * m));
      expand_k(b, word(w, 2 * m + 1), word(low, 2 * m + 1));
#pragma unroll
      for (int n = 0; n < NT; n++) {
        mma_f16(s[n][m], a[0], b[0], a[1], b[1], k.scaled[n][j][0], k.scaled[n][j][1]);
        mma_f16(s[n][m], a[2], b[2], a[3], b[3], k.scaled[n][j][2], k.scaled[n][j][3]);
      }
    }
  }
  if (mask) mask_slice(s, p, seg, token, exact_start, lane);
  const float scale = p.scale / CODE_SCALE;
  raise_top(st, s, scale);
  u32 prob[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      prob[n][i] = transpose8x8(pack_f16(exp2_fast(fmaf(s[n][i / 2][(i & 1) * 2], scale, -st.top[n][0])),
                                         exp2_fast(fmaf(s[n][i / 2][(i & 1) * 2 + 1], scale, -st.top[n][1]))));
  u32 scaled[NT][4];
#pragma unroll
  for (int mt = 0; mt < MT; mt += 2) {
    const uint4 w = lds128(mine + ST_V + mt * 256), low = PLANES == 2 ? lds128(mine + ST_V + PLANE + mt * 256) : w;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      constexpr int PER = VALUE_GROUP_SIZE / 16;
      const int v = (mt + m) / PER;
      if ((mt + m) % PER == 0) {
        const uint4 vs = lds128(stage + ST_VS + (v * 4 + t) * 16),
                    vz = lds128(stage + ST_VS + 64 * NVG + (v * 4 + t) * 16);
        const u32 one = v == 0 ? 0x3c003c00 : 0;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          float sums[4] = {0.f, 0.f, 0.f, 0.f};
          mma_f16(sums, vz.x, one, vz.y, one, prob[n][0], prob[n][1]);
          mma_f16(sums, vz.z, one, vz.w, one, prob[n][2], prob[n][3]);
#pragma unroll
          for (int i = 0; i < 4; i++) scaled[n][i] = mul_f16x2(prob[n][i], word(vs, i));
          mma_f16(sums, HALF_RANGE, 0, HALF_RANGE, 0, scaled[n][0], scaled[n][1]);
          mma_f16(sums, HALF_RANGE, 0, HALF_RANGE, 0, scaled[n][2], scaled[n][3]);
#pragma unroll
          for (int i = 0; i < 4; i++) st.sums[n][v][i] += sums[i];
        }
      }
      u32 a[4], b[4];
      expand_v(a, word(w, 2 * m), word(low, 2 * m));
      expand_v(b, word(w, 2 * m + 1), word(low, 2 * m + 1));
#pragma unroll
      for (int n = 0; n < NT; n++) {
        mma_f16(st.acc[n][mt + m], a[0], b[0], a[1], b[1], scaled[n][0], scaled[n][1]);
        mma_f16(st.acc[n][mt + m], a[2], b[2], a[3], b[3], scaled[n][2], scaled[n][3]);
      }
    }
  }
}

// ---- 16 exact tokens ------------------------------------------------------------------------------------------------
DEV void attend_window(State& st, const u32 (&query)[NT][MT][2], u32 stage, const Params& p, const Segment& seg,
                       int token, int exact_start, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float s[NT][1][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][0][i] = 0.f;
  const u32 key = stage + (lane & 15) * WIN_ROW + (lane >> 4) * 16;
#pragma unroll
  for (int x = 0; x < MT; x++) {
    u32 a[4];
    ldmatrix(a, key + x * 32);
#pragma unroll
    for (int n = 0; n < NT; n++) mma_exact(s[n][0], a[0], a[1], a[2], a[3], query[n][x][0], query[n][x][1]);
  }
#pragma unroll
  for (int n = 0; n < NT; n++)
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
  raise_top(st, s, p.scale);
  // Everything that ends up in acc is in units of 1 / CODE_SCALE.
  constexpr float SHIFT = CODE_BITS == 4 ? 0.f : 4.f;
  const u32 unit = pack_exact(1.f / CODE_SCALE, 1.f / CODE_SCALE);
  u32 prob[NT][2];
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      prob[n][i] = transpose8x8(pack_exact(exp2_fast(fmaf(s[n][0][2 * i], p.scale, SHIFT - st.top[n][0])),
                                           exp2_fast(fmaf(s[n][0][2 * i + 1], p.scale, SHIFT - st.top[n][1]))));
    mma_exact(st.sums[n][0], 0, unit, 0, unit, prob[n][0], prob[n][1]);
  }
  const u32 value = stage + 2 * D + ((lane & 7) + (lane >> 4) * 8) * WIN_ROW + ((lane >> 3) & 1) * 16;
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
    u32 a[4];
    ldmatrix_trans(a, value + mt * 32);
#pragma unroll
    for (int n = 0; n < NT; n++) mma_exact(st.acc[n][mt], a[0], a[1], a[2], a[3], prob[n][0], prob[n][1]);
  }
}

#endif

// ---- Which pages are read, and what each of them weighs --------------------------------------------------------------
// The pool block of a segment's n-th old page: those of the list first, then all from `dense` on.
DEV int page_id(const Params& p, const Segment& seg, const int* table, int n, int last_page) {
#if LISTS
  if (n < seg.chosen) return __ldg(p.page_list + seg.head * p.list_stride + p.list_begin[seg.request] + n);
#endif
  return __ldg(table + min(n - seg.chosen + seg.dense, last_page));
}

#if SCORES
// Leave what the warp has summed when it is done with a page, or with the part of it that it reads: of each row the sum of
// 2^(score - top), and top. A page's own mass is the difference to the page before; `reduce_scores` takes it, since
// here every instruction would count. Part 0 is of the warp that has read the page's first slice; if that one was the
// warp's own first, there is nothing to subtract (flag 1); if it has not read the last (no flag 2), part 1 has the rest.
#if TEAM == 1
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
#endif

// ---- A warp's part of a segment -------------------------------------------------------------------------------------
DEV void load_query_tile(u32 (&x)[MT][2], int n, const Params& p, const Segment& seg, int lane) {
  const int row = n * 8 + (lane >> 2);
  const u32* q = (const u32*)(p.query + row_offset(p, seg, min(row, seg.rows - 1), p.query_stride)) + (lane & 3);
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) x[i / 2][i % 2] = __ldg(q + i * 4);
}

// A row tile of the query as fp16 fragments; rows that are not there are 0.
DEV void keep_query_tile(const u32 (&q)[MT][2], int n, const Segment& seg, u32 query, int lane) {
  const bool there = n * 8 + (lane >> 2) < seg.rows;
#pragma unroll
  for (int j = 0; j < J; j++) {
    uint4 x = make_uint4(exact_to_f16(q[2 * j][0]), exact_to_f16(q[2 * j][1]), exact_to_f16(q[2 * j + 1][0]),
                         exact_to_f16(q[2 * j + 1][1]));
    sts128(query + ((n * J + j) * 32 + lane) * 16, there ? x : make_uint4(0, 0, 0, 0));
  }
}

// A segment's part between two units, in its own terms: slices of pages, and 16s of exact tokens.
struct Part {
  int start, plain, skipped;  // the window's first token; slices before it, as they are counted here; those not read
  int slice_b, most_e, recent_b, recent_e;
};

DEV Part part_of_segment(const Segment& seg, int begin, int end) {
  constexpr int PER = G / 32;
  Part x;
  // Slices that are not read: slice i of those that are is slice i + skipped of the request (if it is not of the list).
  x.skipped = (seg.dense - seg.chosen) * PER;
  x.start = window_start(seg.first), x.plain = x.start / 32 - x.skipped;
  // Units from `plain` on are 16 tokens, cost WINDOW_COST each, and belong to whoever holds their first.
  const int b = begin - seg.begin, e = end - seg.begin;
  x.recent_b = max(0, b - x.plain + WINDOW_COST - 1) / WINDOW_COST;
  x.recent_e = max(0, e - x.plain + WINDOW_COST - 1) / WINDOW_COST;
  x.slice_b = b < x.plain ? b : x.plain + (x.recent_b + 1) / 2, x.most_e = e < x.plain ? e : x.plain + (x.recent_e + 1) / 2;
  return x;
}

// 16 exact tokens to shared memory.
DEV void load_window(u32 to, const unsigned char* pool, i64 stride, int id, int token, int low, int last, int lane) {
  const unsigned char* from = pool + id * stride + (token % WINDOW_BLOCK) * (4 * D);
#pragma unroll
  for (int i = 0; i < D / 8; i++) {
    const int c = i * 32 + lane, row = c / (D / 4), column = c % (D / 4);
    const bool there = token + row >= low && token + row <= last;
    copy16_or_zero(to + row * WIN_ROW + column * 16, there ? from + c * 16 : from, there);
  }
}

#if TEAM > 1
#include "decode_attention_team.cuh"
#else
DEV void load_query(u32 (&x)[NT][MT][2], const Params& p, const Segment& seg, int lane) {
#pragma unroll
  for (int n = 0; n < NT; n++) load_query_tile(x[n], n, p, seg, lane);
}

DEV void attend(State& st, const Params& p, const Segment& seg, int begin, int end, u32 ring, u32 query, const Member&,
                int lane) {
  reset(st);
  if (seg.last < seg.first || seg.first < 0 || seg.rows <= 0) return;
  constexpr int PER = G / 32;
  const Part part = part_of_segment(seg, begin, end);
  const int start = part.start, plain = part.plain, skipped = part.skipped, slice_b = part.slice_b;

  // Everything that the first slices wait for is requested before any of it is used.
  const int* table = p.block_table + (i64)seg.request * p.block_table_stride;
  const int page_b = slice_b / PER, last_page = seg.last / G;
  int ids = page_id(p, seg, table, page_b + lane, last_page), next_ids = page_id(p, seg, table, page_b + 32 + lane, last_page);
  // The window's blocks from `start` on, one per lane; the last missing one below the first position ends what it
  // lacks.
  const int entry = start / WINDOW_BLOCK + lane;
  int window_id = 0;
  if (entry <= seg.last / WINDOW_BLOCK)
    window_id = __ldg(p.window_block_table + (i64)seg.request * p.window_table_stride + entry);
  u32 rows[NT][MT][2];
  load_query(rows, p, seg, lane);
  const u32 missing = __ballot_sync(ALL, window_id <= 0 && entry * WINDOW_BLOCK < seg.first);
  int exact_start = start;
  if (missing) exact_start = min(seg.first, (start / WINDOW_BLOCK + 32 - __clz(missing)) * WINDOW_BLOCK);
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
      commit();
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
      wait<S - 2>();
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
    wait<0>();
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
      commit();
    };
#pragma unroll
    for (int i = 0; i < WIN_STAGES; i++) load_next(i);
    if (slice_b < slice_e) load_query(rows, p, seg, lane);
    int slot = 0;
    for (int token = token_b; token < token_e; token += 16) {
      wait<WIN_STAGES - 1>();
      __syncwarp();
      attend_window(st, rows, ring + slot * WIN_STAGE, p, seg, token, exact_start, lane);
      __syncwarp();
      load_next(slot);
      slot = slot + 1 == WIN_STAGES ? 0 : slot + 1;
    }
    wait<0>();
    __syncwarp();
  }
}

#endif  // TEAM > 1

// Of the tile `mt` of those that a warp sums, which begin at `first`.
DEV float output_of(const State& st, int n, int mt, int first, int i) {
  float sum = st.sums[n][TEAM == 1 ? mt * 16 / VALUE_GROUP_SIZE : 0][i & 1];
  if (TEAM > 1)
#pragma unroll
    for (int v = 1; v < NVG; v++)
      if ((first + mt) * 16 / VALUE_GROUP_SIZE == v) sum = st.sums[n][v][i & 1];
  return st.acc[n][mt][i] * (1.f / CODE_SCALE) + sum;
}
DEV u16 to_exact(float x) { return (u16)pack_exact(x, 0.f); }

// ---- The kernel -----------------------------------------------------------------------------------------------------
// A warp leaves a segment that it did not do alone in two places: its last one in its ring, one before in the
// workspace.
__shared__ float2 row_state[2][TEAMS][ROWS];  // (top, sum); [1] last, [0] before
__shared__ int part_of[2][TEAMS], team_begin[TEAMS + 1];
__shared__ float weight_of[TEAMS][ROWS];
__shared__ Segment edges[2];  // a CTA's first and last: reading lengths again is slow under load

#if SCORES
DEV void store_lse(const Params& p, const Segment& s, int row, float top, float sum) {
  p.lse[row_offset(p, s, row, (i64)p.num_heads * QUERY_GROUP * D) / D] = __log2f(sum) + top;
}
#endif

DEV void store_part(const State& st, const Params& p, const Segment& seg, bool whole, bool last, unsigned char* own,
                    float* spill, const Member& me, int lane) {
  const int g = lane >> 2, t = lane & 3, first = me.index * OWN_MT, channel = g + first * 16;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int row = n * 8 + 2 * t + e;
      const float sum = st.sums[n][0][2 + e], inverse = sum > 0.f ? 1.f / sum : 0.f;
      if (row >= seg.rows) continue;
      if (whole) {
        u16* o = p.out + row_offset(p, seg, row, p.out_stride) + channel;
#pragma unroll
        for (int mt = 0; mt < OWN_MT; mt++) {
          o[mt * 16] = to_exact(output_of(st, n, mt, first, e) * inverse);
          o[mt * 16 + 8] = to_exact(output_of(st, n, mt, first, e + 2) * inverse);
        }
#if SCORES
        if (g == 0 && me.index == 0) store_lse(p, seg, row, st.top[n][e], sum);
#endif
      } else {
        float* o = (last ? (float*)own : spill) + row * (D + 4) + channel;
#pragma unroll
        for (int mt = 0; mt < OWN_MT; mt++) {
          o[mt * 16] = output_of(st, n, mt, first, e);
          o[mt * 16 + 8] = output_of(st, n, mt, first, e + 2);
        }
        if (g == 0 && me.index == 0) row_state[last][me.team][row] = make_float2(st.top[n][e], sum);
      }
    }
}

DEV float warp_max(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
  return x;
}
DEV float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(ALL, x, d);
  return x;
}
DEV void add_weighted(float4& o, float weight, float4 v) {
  o.x += weight * v.x, o.y += weight * v.y, o.z += weight * v.z, o.w += weight * v.w;
}
DEV void store_row(const Params& p, const Segment& seg, int row, int d, float4 o) {
  *(uint2*)(p.out + row_offset(p, seg, row, p.out_stride) + d) = make_uint2(pack_exact(o.x, o.y), pack_exact(o.z, o.w));
}

// A CTA's share of a segment: [ROWS][D] sums, then [ROWS] (top, sum). Slot 1 for a segment that begins inside its
// range.
DEV float* partial_of(const Params& p, int cta, int slot) { return p.partial + (i64)(cta * 2 + slot) * ROWS * (D + 2); }

// Merge the teams' shares of a segment, into the output or into this CTA's share.
DEV void merge_teams(const Params& p, const Segment& seg, bool inside, float* partial, int warp, int lane) {
  bool last = false, before = false;
  if (lane < TEAMS) last = part_of[1][lane] == seg.begin, before = part_of[0][lane] == seg.begin;
  const bool any_before = __any_sync(ALL, before);
  for (int row = warp; row < seg.rows; row += NW) {
    const float2 state = last || before ? row_state[last][lane][row] : make_float2(NEVER, 0.f);
    const float top = warp_max(state.x), weight = last || before ? exp2_fast(state.x - top) : 0.f;
    const float sum = warp_sum(weight * state.y);
    if (lane < TEAMS) weight_of[lane][row] = inside ? (sum > 0.f ? weight / sum : 0.f) : weight;
    if (!inside && lane == 0) ((float2*)(partial + ROWS * D))[row] = make_float2(top, sum);
#if SCORES
    if (inside && lane == 0) store_lse(p, seg, row, top, sum);
#endif
  }
  __syncthreads();
  for (int x = threadIdx.x; x < seg.rows * (D / 4); x += THREADS) {
    const int row = x / (D / 4), d = x % (D / 4) * 4;
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f), part[TEAMS];
    float weight[TEAMS];
#pragma unroll
    for (int w = 0; w < TEAMS; w++) {
      weight[w] = weight_of[w][row];
      part[w] = ((const float4*)(smem + w * TEAM_BYTES))[(row * (D + 4) + d) / 4];
    }
    if (any_before)
#pragma unroll
      for (int w = 0; w < TEAMS; w++)
        if (part_of[0][w] == seg.begin)
          part[w] = ((const float4*)(p.spill + (i64)(blockIdx.x * TEAMS + w) * ROWS * (D + 4)))[(row * (D + 4) + d) / 4];
#pragma unroll
    for (int w = 0; w < TEAMS; w++)
      if (weight[w] != 0.f) add_weighted(o, weight[w], part[w]);
    if (inside) store_row(p, seg, row, d, o);
    else *(float4*)(partial + row * D + d) = o;
  }
}

// CTAs that share a segment count themselves in; the last to have seen all of them sets the counters back for the next
// launch.
DEV int* counters_of(const Params& p, const Segment& seg) {
  return p.arrived + 2 * ((seg.request * p.num_heads + seg.head) * PASSES + seg.tile);
}
DEV int load_acquire(const int* x) {
  int r;
  asm volatile("ld.acquire.gpu.global.s32 %0,[%1];" : "=r"(r) : "l"(x) : "memory");
  return r;
}

// Merge this CTA's part of the output of a segment that `count` CTAs share.
DEV void merge_ctas(const Params& p, const Segment& seg, int per_cta, int all_units) {
  constexpr int AHEAD = 6;
  float4* const sums = (float4*)smem;  // the rings are done with
  float2* const states = (float2*)(smem + 16 * THREADS);
  const int first = seg.begin / per_cta, count = (seg.end - 1) / per_cta - first + 1,
            first_slot = seg.begin > first * per_cta;
  // A CTA merges only the last segment that it has a share of: the others need not wait for one that does two.
  const int mergers = count - (seg.end % per_cta != 0 && seg.end != all_units);
  if (threadIdx.x == 0) {
    int* counters = counters_of(p, seg);
    while (load_acquire(counters) < count) {
    }
    if (atomicAdd(counters + 1, 1) == mergers - 1) counters[0] = counters[1] = 0;
  }
  __syncthreads();
  const int total = seg.rows * (D / 4), mine = (total + mergers - 1) / mergers,
            begin = ((int)blockIdx.x - first) * mine;
  const int elements = min(mine, total - begin);
  if (elements <= 0) return;
  // Threads that one element has: each takes every ways-th CTA.
  const int ways = max(1, THREADS / elements), way = threadIdx.x / elements;
  for (int base = 0; base < elements; base += THREADS) {
    const int element = base + (ways == 1 ? threadIdx.x : threadIdx.x - way * elements);
    const bool busy = ways == 1 ? element < elements : way < ways;
    const int at = begin + element, row = at / (D / 4);
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
    float top = NEVER, sum = 0.f;
    if (busy)
      for (int c0 = ways == 1 ? 0 : way; c0 < count; c0 += AHEAD * ways) {
        float4 part[AHEAD];
        float2 state[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
          const int c = c0 + i * ways;
          const float* from = partial_of(p, first + c, c ? 0 : first_slot);
          state[i] = c < count ? __ldcg((const float2*)(from + ROWS * D) + row) : make_float2(NEVER, 0.f);
          part[i] = c < count ? __ldcg((const float4*)from + at) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
        float high = top;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) high = fmaxf(high, state[i].x);
        const float factor = exp2_fast(top - high);
        o.x *= factor, o.y *= factor, o.z *= factor, o.w *= factor, sum *= factor, top = high;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
          const float weight = exp2_fast(state[i].x - high);
          sum += weight * state[i].y;
          add_weighted(o, weight, part[i]);
        }
      }
    if (ways > 1) {
      sums[threadIdx.x] = o, states[threadIdx.x] = make_float2(top, sum);
      __syncthreads();
      if (way == 0) {
        for (int w = 1; w < ways; w++) {
          const float2 state = states[w * elements + threadIdx.x];
          const float high = fmaxf(top, state.x), a = exp2_fast(top - high), b = exp2_fast(state.x - high);
          o.x *= a, o.y *= a, o.z *= a, o.w *= a, sum = sum * a + state.y * b, top = high;
          add_weighted(o, b, sums[w * elements + threadIdx.x]);
        }
      }
    }
    if (busy && way == 0 || busy && ways == 1) {
      const float inverse = sum > 0.f ? 1.f / sum : 0.f;
      store_row(p, seg, row, at % (D / 4) * 4, make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse));
#if SCORES
      if (at % (D / 4) == 0) store_lse(p, seg, row, top, sum);
#endif
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attention(const __grid_constant__ Params p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int total = scan_requests(p, warp, lane);
  const int per_cta = max((total + (int)gridDim.x - 1) / (int)gridDim.x, p.min_units);
  const int cta_b = min(total, (int)blockIdx.x * per_cta), cta_e = min(total, cta_b + per_cta);
  if (cta_b >= cta_e) return wait_for_predecessor();
  // With SCORES a team has a page's slices at least, so that no page is cut into more than two parts.
  auto begin_of = [&](int w) {
    const int begin = (int)((u32)((cta_e - cta_b) * w) / TEAMS);
    return cta_b + (SCORES ? min(cta_e - cta_b, max(begin, w * (G / 32))) : begin);
  };
  if (threadIdx.x <= TEAMS) team_begin[threadIdx.x] = begin_of(threadIdx.x);
  if (threadIdx.x < 2 * TEAMS) part_of[threadIdx.x / TEAMS][threadIdx.x % TEAMS] = -1;
  if (warp == NW - 1 && lane < 2) edges[lane] = segment_at(p, lane ? cta_e - 1 : cta_b);
  __syncthreads();
  if (PAGES_MAY_CHANGE || SCORES) wait_for_predecessor();

  const Member me = {TEAM == 1 ? warp : warp / TEAM, TEAM == 1 ? 0 : warp % TEAM};
  unsigned char* const own = smem + me.team * TEAM_BYTES;
  const int end = begin_of(me.team + 1);
  for (int unit = begin_of(me.team); unit < end;) {
    const Segment seg = unit >= edges[1].begin ? edges[1] : unit < edges[0].end ? edges[0] : segment_at(p, unit);
    const int stop = min(end, seg.end);
    const bool whole = unit == seg.begin && stop == seg.end, last = stop == end;
    State st;
    attend(st, p, seg, unit, stop, shared_address(own), shared_address(own + RING), me, lane);
    wait_for_predecessor();  // it may be reading what is written from here on
    release_successor();
    store_part(st, p, seg, whole, last, own, p.spill + (i64)(blockIdx.x * TEAMS + me.team) * ROWS * (D + 4), me, lane);
    if (!whole && lane == 0) part_of[last][me.team] = seg.begin;
    unit = stop;
  }
  __syncthreads();

  for (int unit = cta_b; unit < cta_e;) {
    const Segment seg = unit == cta_b ? edges[0] : unit == edges[1].begin ? edges[1] : segment_at(p, unit);
    const bool inside = seg.begin >= cta_b && seg.end <= cta_e;
    unit = seg.end;
    const bool whole = lane < TEAMS && team_begin[lane] <= seg.begin && seg.end <= team_begin[lane + 1];
    if (__any_sync(ALL, whole)) continue;  // one team did it all
    const int slot = seg.begin > cta_b;
    merge_teams(p, seg, inside, partial_of(p, blockIdx.x, slot), warp, lane);
    __syncthreads();
    if (!inside && threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counters_of(p, seg), 1);
    }
  }
  const Segment& seg = edges[1];
  if (seg.end >= cta_e && (seg.begin < cta_b || seg.end > cta_e)) merge_ctas(p, seg, per_cta, total);
}
