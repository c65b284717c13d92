// All that a decoder layer computes between two attentions, for up to 4 tokens, in one launch:
//     o -> add residual, RMSNorm -> gate and up -> silu(gate) * up -> down -> add residual, RMSNorm -> the next layer's qkv
// with INT4 weights in groups of 128, in the order of int4_linear.py (draft_layer_packed.cuh) or in that of vLLM's Marlin kernel
// (draft_layer_marlin.cuh, up to 2 tokens). A row tile is 16 outputs in either. Compiled by NVRTC.
//
// The four linears are phases of one CTA per multiprocessor (or MIN_CTAS), each with its share of the row tiles of every phase;
// between two phases all CTAs wait for each other (grid_barrier.cuh). One warp brings weights into a ring in shared memory and
// never waits for anything but room there: weights are constants, so that the next phase's stream in while the others wait and
// while what lies between two linears is computed. At most FLIGHT stages are asked for at a time: what the others read and how
// they meet would have to wait behind more.
//
// The warps that multiply split the channels, in chunks of 128, and their sums meet in shared memory. Every CTA has all inputs of
// a linear in shared memory, in 16 bits (draft_layer_inputs.cuh). A row tile of gate and the same one of up are one CTA's, so
// that only their product is written.
//
// The launch overlaps with its predecessor (programmatic dependent launch): the ring is filled before the wait. The successor is
// released after it, by all CTAs, so that it cannot begin, and take a place on the GPU, before all CTAs of this launch are there.
//
// Macros: IS_BF16 WARPS STAGES FLIGHT TOKENS HIDDEN_TILES (row tiles of o and down in a pass) PAIRS (of gate and up, in a pass)
//         QKV_TILES PIECES (of 8 channels of a token, that a thread normalizes) MIN_CTAS MARLIN (the order) HAS_ZEROS (with it)

#include "draft_layer_inputs.cuh"

DEV constexpr int max3(int a, int b, int c) { return a > b ? (a > c ? a : c) : (b > c ? b : c); }
constexpr int S = STAGES;
constexpr int TILE_SUMS = 8 * TOKENS;  // of a warp, in float2: rows r and r + 8 of a token
static_assert(max3(PAIRS, HIDDEN_TILES, QKV_TILES) * TILE_SUMS <= THREADS, "a thread finishes one float2");
static_assert(FLIGHT <= STAGES && TOKENS <= 4, "");

struct Cursor {
  int slot;
  u32 parity;
  DEV void step() {
    if (++slot == S) slot = 0, parity ^= 1;
  }
};
// Lanes read their column of B fragments, and scales of the token whose sums they have.
struct Column {
  u32 codes, scales;
};
#if MARLIN
#include "draft_layer_marlin.cuh"
#else
#include "draft_layer_packed.cuh"
#endif
constexpr int RING = S * STAGE;

struct Params {
  Linear o, gate_up, down, qkv;
  const u16* attention;
  const u16* residual;
  const u16* norm;       // before gate and up
  const u16* next_norm;  // before qkv
  const u16* bias;       // of qkv, or null
  u16* activated;
  u16* hidden;  // the sum of residual, o and then down
  u16* out;
  u32* arrived;
  i64 attention_stride, residual_stride;
  float epsilon, next_epsilon;
};

extern __shared__ __align__(128) u8 smem[];  // ring, squares of normalize, and then what a phase needs
// A phase's shared memory: inputs of so many chunks, their scales, and the warps' sums.
struct Phase {
  Inputs in;
  float2* sums;
  Column column;
};

DEV Phase phase_of(u8* at, int chunks, int lane) {
  const Inputs in = {at, reinterpret_cast<float4*>(at + chunks * INPUT_BYTES)};
  return {in, reinterpret_cast<float2*>(in.scales + chunks * TOKENS),
          {column_of_lane(in, lane), shared_address(in.scales + token_of_sums(lane))}};
}

struct Share {
  int begin, end;
};
DEV Share share_of(int units) {
  return {(int)((u32)(units * blockIdx.x) / gridDim.x), (int)((u32)(units * (blockIdx.x + 1)) / gridDim.x)};
}

// ---- The warp that fills the ring -----------------------------------------------------------------------------------
struct Filling {
  u32 ring, full, empty;
  Cursor next, awaited;  // the stage to fill, and the oldest that may not be there yet
  int asked;             // stages from there on
};
// All of a phase, in the order of consumption: pass, NW chunks, tile. Row tiles of gate and up take turns.
template <int T, bool PAIRED>
DEV void fill(Filling& f, const Linear& l, Share share) {
  constexpr int UNITS = PAIRED ? T / 2 : T;
  for (int first = share.begin; first < share.end; first += UNITS) {
    const int count = min(UNITS, share.end - first) * (PAIRED ? 2 : 1);
    for (int chunk = 0; chunk < l.chunks; chunk += NW) {
      const int n = min(NW, l.chunks - chunk);
      for (int i = 0; i < count; i++) {
        const int tile = PAIRED ? first + i / 2 + (i & 1) * (l.tiles / 2) : first + i;
        const Place from(l, tile, chunk);
        const u32 to = f.ring + f.next.slot * STAGE, done = f.full + f.next.slot * 8;
        if (f.asked == FLIGHT) wait_for(f.full + f.awaited.slot * 8, f.awaited.parity), f.awaited.step();
        else f.asked++;
        wait_for(f.empty + f.next.slot * 8, f.next.parity ^ 1);
        ask_for_stage(l, from, n, to, done);
        f.next.step();
      }
    }
  }
}

// ---- Sums of the warps ----------------------------------------------------------------------------------------------
// What a thread finishes: two rows of a row tile (or of one of gate and the same of up), 8 apart, one token.
struct Position {
  int unit, g, token;
  DEV Position(int thread) : unit(thread / TILE_SUMS), g(thread % TILE_SUMS / TOKENS), token(thread % TOKENS) {}
};
template <int T>
DEV void leave_sums(const float (&acc)[T][LANE_SUMS], int count, float2* sums, int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  if (t < LANES_WITH_SUMS) {
#pragma unroll
    for (int i = 0; i < T; i++)
      if (i < count) leave_tile(acc[i], sums, (warp * T + i) * TILE_SUMS, g, t);
  }
  meet<THREADS>();
}
// Always in the same order.
template <int T>
DEV float2 sum_of(const float2* sums, int tile, int at) {
  float2 v = make_float2(0.f, 0.f);
#pragma unroll
  for (int w = 0; w < NW; w++) {
    const float2 u = sums[(w * T + tile) * TILE_SUMS + at];
    v.x += u.x, v.y += u.y;
  }
  return v;
}
DEV void store(u16* to, i64 stride, int row, int token, float v0, float v1) {
  to += token * stride + row;
  to[0] = to_16bit(v0), to[8] = to_16bit(v1);
}

// ---- Phases: this CTA's rows of a linear ----------------------------------------------------------------------------
// hidden = residual + x W^T
DEV void add_linear(const Params& p, const Linear& l, Share share, Ring& ring, const Phase& phase, const u16* residual,
                    i64 residual_stride, int warp, int lane) {
  const Position at(threadIdx.x);
#pragma unroll 1
  for (int first = share.begin; first < share.end; first += HIDDEN_TILES) {
    const int count = min(HIDDEN_TILES, share.end - first), row = row_of(first + at.unit, at.g);
    const bool mine = at.unit < count;
    u32 old[2] = {0, 0};
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (mine) old[h] = read16(residual + at.token * residual_stride + row + h * 8);
    float acc[HIDDEN_TILES][LANE_SUMS];
    multiply<HIDDEN_TILES, false>(acc, ring, first, count, l.chunks, phase.column, warp, lane);
    leave_sums(acc, count, phase.sums, warp, lane);
    if (mine) {
      const float2 v = sum_of<HIDDEN_TILES>(phase.sums, at.unit, threadIdx.x % TILE_SUMS);
      store(p.hidden, l.tiles * 16, row, at.token, v.x + low_float(old[0]), v.y + low_float(old[1]));
    }
    if (first + HIDDEN_TILES < share.end) meet<THREADS>();
  }
}

DEV float silu(float x) { return x / (1.f + __expf(-x)); }

// activated = silu(gate) * up
DEV void activate(const Params& p, Share share, Ring& ring, const Phase& phase, int warp, int lane) {
  constexpr int T = 2 * PAIRS;
  const Position at(threadIdx.x);
#pragma unroll 1
  for (int first = share.begin; first < share.end; first += PAIRS) {
    const int count = min(PAIRS, share.end - first);
    float acc[T][LANE_SUMS];
    multiply<T, true>(acc, ring, first, 2 * count, p.gate_up.chunks, phase.column, warp, lane);
    leave_sums(acc, 2 * count, phase.sums, warp, lane);
    if (at.unit < count) {
      const float2 gate = sum_of<T>(phase.sums, 2 * at.unit, threadIdx.x % TILE_SUMS);
      const float2 up = sum_of<T>(phase.sums, 2 * at.unit + 1, threadIdx.x % TILE_SUMS);
      store(p.activated, p.gate_up.tiles * 8, row_of(first + at.unit, at.g), at.token, silu(gate.x) * up.x,
            silu(gate.y) * up.y);
    }
    if (first + PAIRS < share.end) meet<THREADS>();
  }
}

// The next layer's qkv.
DEV void project(const Params& p, Share share, Ring& ring, const Phase& phase, int warp, int lane) {
  const Position at(threadIdx.x);
#pragma unroll 1
  for (int first = share.begin; first < share.end; first += QKV_TILES) {
    const int count = min(QKV_TILES, share.end - first), row = row_of(first + at.unit, at.g);
    const bool mine = at.unit < count;
    float b0 = 0.f, b1 = 0.f;
    const int place = bias_of(first + at.unit, at.g);
    if (mine && p.bias) b0 = low_float(read16(p.bias + place)), b1 = low_float(read16(p.bias + place + BIAS_STEP));
    float acc[QKV_TILES][LANE_SUMS];
    multiply<QKV_TILES, false>(acc, ring, first, count, p.qkv.chunks, phase.column, warp, lane);
    leave_sums(acc, count, phase.sums, warp, lane);
    if (mine) {
      const float2 v = sum_of<QKV_TILES>(phase.sums, at.unit, threadIdx.x % TILE_SUMS);
      store(p.out, p.qkv.tiles * 16, row, at.token, v.x + b0, v.y + b1);
    }
    if (first + QKV_TILES < share.end) meet<THREADS>();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, MIN_CTAS) draft_layer(const __grid_constant__ Params p) {
  __shared__ __align__(8) unsigned long long barriers[2 * S];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Share hidden = share_of(p.o.tiles), pairs = share_of(p.gate_up.tiles / 2), qkv = share_of(p.qkv.tiles);
  const u32 ring_at = shared_address(smem), full = shared_address(barriers), empty = full + 8 * S;
  if (threadIdx.x < S) {
    barrier_init(full + threadIdx.x * 8, 1);
    barrier_init(empty + threadIdx.x * 8, NW);
    fence_barriers();
  }
  __syncthreads();
  if (warp == NW) {
    if (lane > 0) return;
    Filling f = {ring_at, full, empty, {0, 0}, {0, 0}, 0};
    expect(p.o), expect(p.gate_up), expect(p.down), expect(p.qkv);
    fill<HIDDEN_TILES, false>(f, p.o, hidden);
    fill<2 * PAIRS, true>(f, p.gate_up, pairs);
    fill<HIDDEN_TILES, false>(f, p.down, hidden);
    fill<QKV_TILES, false>(f, p.qkv, qkv);
    return;
  }
  const int channels = p.o.tiles * 16;
  float* const squares = reinterpret_cast<float*>(smem + RING);
  u8* const rest = smem + RING + (p.gate_up.chunks * TOKENS * 4 + 127) / 128 * 128;
  Ring ring = ring_of(ring_at, full, empty, warp, lane);
  GridBarrier all;
  wait_for_predecessor();
  release_successor();
  if (threadIdx.x == 0) all.begin(p.arrived);

  Phase phase = phase_of(rest, p.o.chunks, lane);
  store_inputs(phase.in, p.attention, p.attention_stride, p.o.chunks * 128);
  add_linear(p, p.o, hidden, ring, phase, p.residual, p.residual_stride, warp, lane);
  phase = phase_of(rest, p.gate_up.chunks, lane);
  store_normalized(phase.in, all, p.hidden, p.norm, p.epsilon, channels, squares, lane);
  activate(p, pairs, ring, phase, warp, lane);
  meet<THREADS>();
  if (threadIdx.x == 0) all.wait();
  meet<THREADS>();
  phase = phase_of(rest, p.down.chunks, lane);
  store_inputs(phase.in, p.activated, p.gate_up.tiles * 8, p.down.chunks * 128);
  add_linear(p, p.down, hidden, ring, phase, p.hidden, channels, warp, lane);
  phase = phase_of(rest, p.qkv.chunks, lane);
  store_normalized(phase.in, all, p.hidden, p.next_norm, p.next_epsilon, channels, squares, lane);
  project(p, qkv, ring, phase, warp, lane);
}
