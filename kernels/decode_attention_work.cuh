// The work of a launch, a line of units: where requests and their segments lie on it, and what a part of a segment is.
// Macros: LISTS PASSES QUERY_GROUP
#pragma once

#include "decode_attention_layout.cuh"

// In slices of 32 quantized tokens: what 16 exact tokens cost, and a segment's merge.
constexpr int WINDOW_COST = WGMMA ? 3 : 2, SEGMENT_COST = 8;
constexpr int MAX_CHUNKS = 32;  // of 32 requests

// A warp's place: its team in the CTA, and which of the team it is.
struct Member {
  int team, index;
};

struct Segment {
  int begin, end;  // units on the line
  int request, head, tile;
  int first, last;  // positions of the first and the last query token
  int token, rows;  // first query token's index, rows of this row tile
  int chosen, dense;  // LISTS: pages read from the list, and the page from which on all are read
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
  return start / 32 - skipped * PER + WINDOW_COST * ((last - start) / 16 + 1) + SEGMENT_COST;
}

// ---- From requests to segments --------------------------------------------------------------------------------------
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

__shared__ int prefix[MAX_CHUNKS * 32], chunk_begin[MAX_CHUNKS + 1];

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

// ---- A part of a segment --------------------------------------------------------------------------------------------
DEV bool is_empty(const Segment& seg) { return seg.last < seg.first || seg.first < 0 || seg.rows <= 0; }

// What lies between two units, in its own terms: slices of pages, and 16s of exact tokens.
struct Part {
  int start, plain, skipped;  // the window's first token; slices before it, as they are counted here; those not read
  int slice_b, most_e, recent_b, recent_e;
};

DEV Part part_of_segment(const Segment& seg, int begin, int end) {
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
