// What a segment reads: its query rows, pages, and the exact window; and which tokens each of the rows does.
// Macros: LISTS QUERY_GROUP WINDOW_BLOCK
#pragma once

#include "decode_attention_fragments.cuh"
#include "decode_attention_work.cuh"

// ---- Query rows -----------------------------------------------------------------------------------------------------
// Element offset of a row of a segment's tile, in a tensor [token, head, channel].
DEV i64 row_offset(const Params& p, const Segment& s, int row, i64 stride) {
  const int r = s.tile * ROWS + row, q = (u32)r / QUERY_GROUP;
  return (s.token + q) * stride + (i64)(s.head * QUERY_GROUP + r - q * QUERY_GROUP) * D;
}

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

// Boundaries of a row: it reads pages below `from`, the window in [from, position].
DEV void row_bounds(const Segment& s, int row, int exact_start, int& from, int& position) {
  position = min(s.first + (int)((u32)(s.tile * ROWS + row) / QUERY_GROUP), s.last);
  from = max(window_start(position), exact_start);
}

// Tokens of a slice that a row reads from the window, or not at all.
DEV void mask_slice(float (&s)[NT][2][4], const Segment& seg, int token, int exact_start, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int from, position;
      row_bounds(seg, n * 8 + 2 * t + e, exact_start, from, position);
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (token + i * 8 + g >= from) s[n][i / 2][(i & 1) * 2 + e] = -__int_as_float(0x7f800000);
    }
}

// Of 16 exact tokens, those that a row of tile `n` reads from pages, or not at all.
DEV void mask_window(float (&s)[4], int n, const Segment& seg, int token, int exact_start, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    int from, position;
    row_bounds(seg, n * 8 + 2 * t + e, exact_start, from, position);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int j = token + i * 8 + g;
      if (j < from || j > position) s[i * 2 + e] = -__int_as_float(0x7f800000);
    }
  }
}

// ---- Pages ----------------------------------------------------------------------------------------------------------
// The pool block of a segment's n-th old page: those of the list first, then all from `dense` on.
DEV int page_id(const Params& p, const Segment& seg, const int* table, int n, int last_page) {
#if LISTS
  if (n < seg.chosen) return __ldg(p.page_list + seg.head * p.list_stride + p.list_begin[seg.request] + n);
#endif
  return __ldg(table + min(n - seg.chosen + seg.dense, last_page));
}

// A slice of a page to a stage of the ring, with the page's key scales where they are asked for.
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

// ---- The exact window -----------------------------------------------------------------------------------------------
// A lane's block of the window, counted from the one of `start`, its first token; 0 if it has none.
DEV int window_block(const Params& p, const Segment& seg, int start, int lane) {
  const int entry = start / WINDOW_BLOCK + lane;
  if (entry > seg.last / WINDOW_BLOCK) return 0;
  return __ldg(p.window_block_table + (i64)seg.request * p.window_table_stride + entry);
}

// The first token that is in the window: the last missing block below the first position ends what it lacks.
DEV int first_exact(const Segment& seg, int start, int block, int lane) {
  const u32 missing = __ballot_sync(ALL, block <= 0 && (start / WINDOW_BLOCK + lane) * WINDOW_BLOCK < seg.first);
  if (!missing) return start;
  return min(seg.first, (start / WINDOW_BLOCK + 32 - __clz(missing)) * WINDOW_BLOCK);
}

// 16 exact tokens to a stage of the ring.
DEV void load_window(u32 to, const unsigned char* pool, i64 stride, int id, int token, int low, int last, int lane) {
  const unsigned char* from = pool + id * stride + (token % WINDOW_BLOCK) * (4 * D);
#pragma unroll
  for (int i = 0; i < D / 8; i++) {
    const int c = i * 32 + lane, row = c / (D / 4), column = c % (D / 4);
    const bool there = token + row >= low && token + row <= last;
    copy16_or_zero(to + row * WIN_ROW + column * 16, there ? from + c * 16 : from, there);
  }
}
