// Attention of a few query tokens per request over quantized pages and the exact recent window. Compiled by NVRTC.
//
// Tokens are the M dimension of mma.m16n8k16 and query rows (query token x head of the GQA group) its N = 8: a lane's
// 16-byte load holds its own A fragments (see vllm_quantspec/format.py), and a tile wastes at most 7 rows. Scales
// multiply the query (keys) and the probabilities (values), minima are one more product, so that a code costs less than
// one instruction.
//
// Every warp streams its own slices of 32 tokens through a private ring in shared memory (cp.async), so the bytes in
// flight do not depend on registers, and no warp waits for another before the end. (More query rows than a warp has
// registers for are a team of warps' work, which stands for the warp in all of this.) Work is one line of units, cut
// evenly over the grid:
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
//         TEAM (warps that share slices: 1, 2 or 4) WGMMA (a team is a warp group: Hopper) QUERY_GROUP (query heads per KV
//         head) ROW_TILES (of 8 rows, in one pass) PASSES (row tiles' passes) PAGES_MAY_CHANGE (the kernel before this one
//         may write pages) SCORES (leave the attention mass of every old page, see `emit`) LISTS (read chosen pages only,
//         see `page_id`)
//
// Here is the course of a CTA; the headers decode_attention_*.cuh have what it consists of:
//     layout                 bytes of a page and of shared memory, parameters
//     work                   the line of units
//     fragments              16-bit floats, and codes that become such
//     softmax                running sums
//     reads                  query rows, pages and the window, and where a row's tokens end
//     warp, warp_products    a warp's part of a segment, and what it computes of a slice
//     team                   the same of a team
//     team_products          pages with mma.m16n8k16, on every GPU
//     team_wgmma             or with the products of a warp group
//     team_exact             exact tokens
//     team_sync, team_sums   how its warps meet, and what they have to add up
//     merge                  sums to output

#include "decode_attention_merge.cuh"

#if TEAM > 1
#include "decode_attention_team.cuh"
#else
#include "decode_attention_warp.cuh"
#endif

__shared__ Segment edges[2];  // a CTA's first and last: reading lengths again is slow under load

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attention(const __grid_constant__ Params p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int total = scan_requests(p, warp, lane);
  const int per_cta = max((total + (int)gridDim.x - 1) / (int)gridDim.x, p.min_units);
  const int cta_b = min(total, (int)blockIdx.x * per_cta), cta_e = min(total, cta_b + per_cta);
  if (cta_b >= cta_e) return wait_for_predecessor();
  // With SCORES a team has a page's slices at least, so that no page is cut into more than two parts.
  auto begin_of = [&](int w) {
    const int begin = (int)((u32)((cta_e - cta_b) * w) / TEAMS);
    return cta_b + (SCORES ? min(cta_e - cta_b, max(begin, w * PER)) : begin);
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
    const bool inside = seg.begin >= cta_b && seg.end <= cta_e;
    store_part(st, p, seg, whole, last, own, p.spill + (i64)(blockIdx.x * TEAMS + me.team) * ROWS * (D + 4),
               inside || SHARES < TEAMS ? nullptr : share_at(p, blockIdx.x, seg.begin > cta_b, me.team), me, lane);
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
    if (inside || SHARES < TEAMS) merge_teams(p, seg, inside, share_at(p, blockIdx.x, slot, 0), warp, lane);
    else leave_nothing(p, seg, slot);
    __syncthreads();
    if (!inside && threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counters_of(p, seg), 1);
    }
  }
  const Segment& seg = edges[1];
  if (seg.end >= cta_e && (seg.begin < cta_b || seg.end > cta_e)) merge_ctas(p, seg, per_cta, total);
}
