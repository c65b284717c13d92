// Where everything lies that decode_attention.cu reads and writes: in a page, in a warp's ring, in shared memory, and, by a
// launch's parameters, in global memory. The macros are explained there.
#pragma once

#include "ptx.cuh"

constexpr int D = HEAD_SIZE, G = GROUP_SIZE, NT = ROW_TILES, NW = WARPS, S = STAGES;
constexpr int TEAMS = NW / TEAM, OWN_MT = D / 16 / TEAM;  // tiles of 16 channels whose output a warp sums
constexpr int ROWS = 8 * NT, J = D / 32, MT = D / 16, NVG = D / VALUE_GROUP_SIZE, THREADS = 32 * NW;
constexpr int PER = G / 32;  // slices of a page
constexpr u32 ALL = 0xffffffffu;

// One head's bytes in a page.
constexpr int K_UPPER = 0, V_UPPER = G * D / 2, K_SCALE = G * D, V_SCALE = K_SCALE + 4 * D;
constexpr int K_LOWER = V_SCALE + 4 * NVG * G, V_LOWER = K_LOWER + G * D / 2;

// One stage of a warp's ring: a slice of 32 tokens, and the key scales when the slice is the first of its page.
constexpr int PLANE = 512 * J, PLANES = CODE_BITS / 4;
constexpr int ST_V = PLANES * PLANE, ST_VS = 2 * PLANES * PLANE, ST_KS = ST_VS + 128 * NVG, STAGE = ST_KS + 4 * D;
constexpr int WIN_ROW = 4 * D + 16, WIN_STAGE = 16 * WIN_ROW;  // 16 exact tokens; padded for ldmatrix, against bank conflicts
constexpr int PART = 4 * ROWS * (D + 4);  // a warp's unnormalized output
constexpr int QUERY = 16 * D * NT;  // fp16 query
#if WGMMA
// A team's ring: keys and values apart, as those of a step are used at different times, whole pages of each plane; and the
// scales of both. Then what shared memory has of a team beside its ring. The query and the probabilities are columns of
// wgmma's B: they begin at multiples of 1024.
constexpr int STEPS = S / TEAM, PAGE_PLANE = TEAM * PLANE, PAGE_CODES = PLANES * PAGE_PLANE;
constexpr int PAGE_SCALES = 4 * D + 4 * NVG * G, SCALE_STEPS = 4;
constexpr int RING_V = STEPS * PAGE_CODES, RING_SCALES = 2 * RING_V;
constexpr int RING_PAGES = RING_SCALES + SCALE_STEPS * PAGE_SCALES, RING_WINDOW = 2 * TEAM * WIN_STAGE;
constexpr int RING_LEAST = RING_PAGES > RING_WINDOW ? RING_PAGES : RING_WINDOW;
constexpr int RING = ((RING_LEAST > PART ? RING_LEAST : PART) + 1023) / 1024 * 1024;
constexpr int PROB = 2 * ROWS * 32 * TEAM, PROB_BUFFERS = NT <= 6 ? 2 : 1;  // of a step; as many as two teams have room for
constexpr int TEAM_PROB = QUERY, TEAM_HIGH = TEAM_PROB + PROB_BUFFERS * PROB, TEAM_BARRIERS = TEAM_HIGH + 4 * ROWS * TEAM;
constexpr int TEAM_EXACT = TEAM_PROB;  // probabilities of exact tokens
constexpr int TEAM_SHARED = (TEAM_BARRIERS + 16 * STEPS + 1023) / 1024 * 1024;
#define SHARED_ALIGNMENT 1024
#else
constexpr int RING_MIN = 2 * TEAM * WIN_STAGE > PART ? 2 * TEAM * WIN_STAGE : PART,
              RING = S * STAGE > RING_MIN ? S * STAGE : RING_MIN;
constexpr int WIN_STAGES = RING >= 3 * WIN_STAGE ? 3 : 2;
// What a team shares beside its ring: fragments of the scaled query, its products with minima, a slice's largest scores and
// probabilities.
constexpr int TEAM_SCALED = QUERY, TEAM_START = TEAM_SCALED + QUERY, TEAM_HIGH = TEAM_START + 4 * ROWS * TEAM,
              TEAM_PROB = TEAM_HIGH + 4 * ROWS * TEAM;
constexpr int TEAM_EXACT = TEAM_SCALED;  // probabilities of exact tokens
constexpr bool PROB_IN_RING = NVG * NT * 512 <= PLANES * PLANE;
constexpr int TEAM_SHARED = TEAM_PROB + (PROB_IN_RING ? 0 : TEAM * NVG * NT * 512);
#define SHARED_ALIGNMENT 128
#endif
constexpr int TEAM_BYTES = RING + (TEAM == 1 ? QUERY : TEAM_SHARED);

extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char smem[];

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
