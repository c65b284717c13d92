// A team of warp groups with roles: SCORERS of them score the keys of every n-th page, one sums the values of all. Part of
// decode_attention.cu, for SCORERS; decode_attention_team_wgmma.cuh has the products.
//
//     scores 0   keys of page 0 -> probabilities | keys of page 2 -> ...
//     scores 1       keys of page 1 -> probabilities | keys of page 3 -> ...
//     values                     values of page 0 | values of page 1 | ...
//
// So there are three warps on each scheduler, none of which needs registers for both, and groups wait for each other only
// where a buffer is full or empty. With BRINGERS a fourth asks for pages: elsewhere asking is a tenth of a step of whoever
// does it. All rows have one `top`, which those who score raise in the order of pages: the decision of a page waits for that
// of the page before. Sums of probabilities stay with those who score until the segment's pages are done.
//
// Pages are counted through a CTA's segments: page n is that of scorer n % SCORERS, and lies in stage n of rings.
#pragma once

#include "decode_attention_team_wgmma.cuh"

static_assert(!SCORES, "the mass of pages is counted in their order");

// ---- Barriers -------------------------------------------------------------------------------------------------------
struct Barriers {
  u32 at;
  DEV Barriers(u32 shared) { at = shared + TEAM_BARRIERS; }
  DEV u32 keys(int scorer, int step) const { return at + (scorer * KEY_STEPS + step) * 8; }  // are there
  DEV u32 values(int step) const { return at + (SCORERS * KEY_STEPS + step) * 8; }  // are there
  DEV u32 values_read(int step) const { return values(VALUE_STEPS + step); }
  DEV u32 probabilities(int buffer) const { return values(2 * VALUE_STEPS + buffer); }  // are there
  DEV u32 probabilities_read(int buffer) const { return probabilities(PROB_BUFFERS + buffer); }
  DEV u32 decided() const { return probabilities(2 * PROB_BUFFERS); }  // a page's `top`
  DEV u32 sums() const { return decided() + 8; }  // of a segment
  DEV u32 sums_read() const { return decided() + 16; }
  // For those who bring pages: the room of values has nothing else in it, and keys that are read.
  DEV u32 room() const { return decided() + 24; }
  DEV u32 keys_read(int scorer, int step) const { return decided() + 32 + (scorer * KEY_STEPS + step) * 8; }
};

// Before the CTA meets for the first time.
DEV void begin_team(u32 shared) {
  const Barriers b(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < SCORERS * KEY_STEPS; i++) barrier_init(b.keys(0, i), PLANES);
    for (int i = 0; i < VALUE_STEPS; i++) barrier_init(b.values(i), PLANES), barrier_init(b.values_read(i), TEAM);
    for (int i = 0; i < 2 * PROB_BUFFERS; i++) barrier_init(b.probabilities(i), TEAM);  // and those read
    barrier_init(b.decided(), 1), barrier_init(b.sums(), SCORERS * TEAM), barrier_init(b.sums_read(), TEAM);
    barrier_init(b.room(), TEAM);
    for (int i = 0; i < SCORERS * KEY_STEPS; i++) barrier_init(b.keys_read(0, i), TEAM);
    fence_shared();
  }
}
// What the lanes of a warp did before is seen by those who wait.
DEV void arrive_together(u32 barrier) {
  __syncwarp();
  if (elected()) arrive(barrier);
}

// What a warp copies of pages, one plane: where in the ring, and from where in the pool.
struct PlaneReader {
  const unsigned char *from, *next;
  i64 stride;
  int slice_b, slice_e, asked;  // the step of the page that is asked for next
  bool asks;

  DEV void begin(const unsigned char* plane, const Params& p, const Part& part, const Pages& r, int step, bool reads) {
    from = next = plane, stride = p.page_stride, slice_b = part.slice_b, slice_e = r.slice_e, asked = step, asks = reads;
  }
  DEV void find(int id) { next = from + id * stride; }
  // What a page lacks at the segment's ends stays what it was, codes of any numbers.
  DEV bool more() const { return asks && asked * TEAM < slice_e; }
  DEV int first() const { return max(slice_b - asked * TEAM, 0) * PLANE; }
  DEV int bytes() const { return min(slice_e - asked * TEAM, TEAM) * PLANE - first(); }
};

// ---- Tops ------------------------------------------------------------------------------------------------------------
DEV void write_tops(const State& st, u32 to, int lane) {
  if (lane < 4)
#pragma unroll
    for (int n = 0; n < NT; n++) sts_float2(to + (n * 8 + 2 * lane) * 4, st.top[n][0], st.top[n][1]);
}
// Sums relative to another `top`, which is not below the one before.
DEV void adopt_tops(State& st, u32 from, int lane) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float2 top = lds_float2(from + (n * 8 + 2 * (lane & 3)) * 4);
    const float factor[2] = {exp2_fast(st.top[n][0] - top.x), exp2_fast(st.top[n][1] - top.y)};
    st.top[n][0] = top.x, st.top[n][1] = top.y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      st.sums[n][0][i] *= factor[i & 1];
#pragma unroll
      for (int m = 0; m < OWN_MT; m++) st.acc[n][m][i] *= factor[i & 1];
    }
  }
}

// ---- Keys to probabilities ---------------------------------------------------------------------------------------------
DEV void score_pages(const Params& p, const Segment& seg, const Part& part, const Pages& r, u32 ring, u32 shared,
                     const Member& me, int lane, PagesDone& done) {
  State st;
  reset(st);
  const int scorer = me.team - 1, step_b = part.slice_b / TEAM, step_e = (r.slice_e + TEAM - 1) / TEAM, n_b = done.pages;
  const u32 query = shared + scorer * QUERY, own_shared = shared + me.team * HIGH;
  const u32 stages = ring + RING_KEYS + scorer * KEY_STEPS * PAGE_CODES;
  const u32 scales = ring + RING_SCALES + scorer * KEY_STEPS * PAGE_SCALES;
  const u32 tops = shared + TEAM_TOPS, raised = shared + TEAM_RAISED;
  const Barriers b(shared);

  // The first of this scorer's pages; how many it has behind it.
  int n = n_b + (scorer + SCORERS - n_b % SCORERS) % SCORERS, count = n / SCORERS;
  PlaneReader reader;
  reader.begin(p.pages + seg.head * p.head_stride + (me.index ? K_LOWER : K_UPPER), p, part, r, step_b + n - n_b,
               !BRINGERS && me.index < PLANES);
  auto ask = [&](int stage) {
    if (reader.more()) {
      const u32 barrier = b.keys(scorer, stage);
      const int first = reader.first(), bytes = reader.bytes();
      if (elected()) {
        arrive_expecting(barrier, bytes + (me.index == 0 ? PAGE_SCALES : 0));
        copy_bulk(stages + stage * PAGE_CODES + me.index * PAGE_PLANE + first, reader.next + first, bytes, barrier);
        if (me.index == 0)
          copy_bulk(scales + stage * PAGE_SCALES, reader.next + K_SCALE - K_UPPER, PAGE_SCALES, barrier);
      }
    }
    reader.asked += SCORERS;
  };
  int stage = count % KEY_STEPS;
  team_sync(me);  // the query before is done with
  if (!BRINGERS)
#pragma unroll
    for (int i = 0; i < KEY_STEPS; i++) {
      reader.find(__shfl_sync(ALL, r.ids.ids, n - n_b + i * SCORERS));
      ask((stage + i) % KEY_STEPS);
    }
  int id = __shfl_sync(ALL, r.ids.ids, n - n_b + KEY_STEPS * SCORERS);
  load_team_query(query, p, seg, me, lane);
  fence_shared();
  team_sync(me);

  int latest = -1;  // the page whose `top` this one is
  const float inverse = 1.f / p.scale;
  // The first codes of a page, before the probabilities of the one before.
  Keys keys;
  auto begin = [&](int stage, int count) {
    wait_for(b.keys(scorer, stage), count / KEY_STEPS & 1);
    keys.begin(stages + stage * PAGE_CODES + me.index * PLANE, scales + stage * PAGE_SCALES, lane);
  };
  if (n - n_b < step_e - step_b) begin(stage, count);
#pragma unroll 1
  for (; n - n_b < step_e - step_b; n += SCORERS, count++) {
    const int step = step_b + n - n_b, slice = step * TEAM + me.index, buffer = n % PROB_BUFFERS;
    const bool has = slice >= part.slice_b && slice < r.slice_e;  // this warp has a slice of this page
    const u32 page_scales = scales + stage * PAGE_SCALES;
    float s[NT][2][4];
    if (!BRINGERS) reader.find(id), compute_here(reader.next);
    multiply_keys(s, keys, __shfl_sync(ALL, columns_at(query), 0), lane);
    Tokens tokens;
    tokens.load(page_scales + 4 * D + me.index * 16, has, lane);
    wgmma_wait<0>();
    hold_scores(s);
    if (BRINGERS) arrive_together(b.keys_read(scorer, stage));
    const int token = has ? (slice + part.skipped) * 32 : 1 << 29;
    if (token + 32 > r.low) mask_slice(s, seg, token, r.exact_start, lane);

    wait_for(b.decided(), n + 1 & 1);
    if (n > n_b) {
      const int by = lds32(raised);
      if (by != latest) latest = by, adopt_tops(st, tops, lane);
    }
    const bool raise = team_any(me, exceeds_top(st, s, inverse)) || n == n_b;
    if (raise) {
      float high[NT][2];
      above_top(high, st, s, p.scale);
      raise_together(st, high, own_shared, me, lane);
      latest = n;
      if (me.index == 0) {
        write_tops(st, tops, lane);
        if (lane == 0) sts32(raised, n);
      }
    }
    if (me.index == 0) arrive_together(b.decided());
    if (!BRINGERS) {
      ask(stage);
      id = page_id(p, seg, r.ids.table, reader.asked, r.ids.last_page);
    }

    wait_for(b.probabilities_read(buffer), n / PROB_BUFFERS + 1 & 1);
    if (++stage == KEY_STEPS) stage = 0;
    if (n + SCORERS - n_b < step_e - step_b) begin(stage, count + 1);
    leave_probabilities(st, s, tokens, shared + TEAM_PROB + buffer * PROB, p.scale, me, lane);
    if (me.index == 0) {
      if (raise) write_tops(st, tops + (1 + buffer) * 4 * ROWS, lane);
      if (lane == 0) sts32(raised + (1 + buffer) * 4, raise);
    }
    fence_shared();
    arrive_together(b.probabilities(buffer));
  }

  wait_for(b.sums_read(), done.segments + 1 & 1);
#pragma unroll
  for (int x = 0; x < NT; x++) {
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = sum_of_rows(st.sums[x][0][i]);
    if (lane < 4)
      sts128(shared + TEAM_SUMS + scorer * SUMS + ((me.index * NT + x) * 4 + lane) * 16,
             make_float4(sum[0], sum[1], sum[2], sum[3]));
  }
  if (me.index == 0) write_tops(st, tops + (1 + PROB_BUFFERS + scorer) * 4 * ROWS, lane);
  arrive_together(b.sums());
  done.pages += step_e - step_b, done.segments++;
}

// ---- Values ------------------------------------------------------------------------------------------------------------
DEV void sum_pages(State& st, const Params& p, const Segment& seg, const Part& part, const Pages& r, u32 ring, u32 shared,
                   const Member& me, int lane, PagesDone& done) {
  const int step_b = part.slice_b / TEAM, pages = (r.slice_e + TEAM - 1) / TEAM - step_b, n_b = done.pages;
  const u32 values = ring + me.index * 512 + lane * 16, tops = shared + TEAM_TOPS, raised = shared + TEAM_RAISED;
  const Barriers b(shared);
  PlaneReader reader;
  reader.begin(p.pages + seg.head * p.head_stride + (me.index ? V_LOWER : V_UPPER), p, part, r, step_b,
               !BRINGERS && me.index < PLANES);
  auto ask = [&](int stage) {
    if (reader.more()) {
      const u32 barrier = b.values(stage);
      const int first = reader.first(), bytes = reader.bytes();
      if (elected()) {
        arrive_expecting(barrier, bytes);
        copy_bulk(ring + stage * PAGE_CODES + me.index * PAGE_PLANE + first, reader.next + first, bytes, barrier);
      }
    }
    reader.asked++;
  };
  fence_shared();  // what was written to the ring is there before copies are
  team_sync(me);
  if (BRINGERS) arrive_together(b.room());
  else
#pragma unroll
    for (int i = 0; i < VALUE_STEPS; i++) {
      reader.find(__shfl_sync(ALL, r.ids.ids, i));
      ask((n_b + i) % VALUE_STEPS);
    }
  int id = __shfl_sync(ALL, r.ids.ids, VALUE_STEPS);

  // Page n and its probabilities are read.
  auto release = [&](int n) {
    __syncwarp();
    if (elected()) arrive(b.values_read(n % VALUE_STEPS)), arrive(b.probabilities_read(n % PROB_BUFFERS));
  };
  // The first slice of a page's values: before its probabilities, and while products of the page before are on the way.
  Values v;
  Fragments first;
  auto begin = [&](int n) {
    wait_for(b.values(n % VALUE_STEPS), n / VALUE_STEPS & 1);
    v.begin(values + n % VALUE_STEPS * PAGE_CODES, 0);
    v.expand_first(first);
  };
  begin(n_b);
#pragma unroll 1
  for (int n = n_b; n < n_b + pages; n++) {
    const int buffer = n % PROB_BUFFERS;
    if (!BRINGERS) reader.find(id), compute_here(reader.next);
    v.columns = __shfl_sync(ALL, columns_at(shared + TEAM_PROB + buffer * PROB), 0);
    wait_for(b.probabilities(buffer), n / PROB_BUFFERS & 1);
    if (lds32(raised + (1 + buffer) * 4)) adopt_tops(st, tops + (1 + buffer) * 4 * ROWS, lane);
    v.multiply(st, first, 0);
    if (!BRINGERS && n > n_b) {  // all have read the page before
      if (reader.more()) wait_for(b.values_read((n - 1) % VALUE_STEPS), (n - 1) / VALUE_STEPS & 1);
      ask((n - 1) % VALUE_STEPS);
      id = page_id(p, seg, r.ids.table, reader.asked, r.ids.last_page);
    }
#pragma unroll
    for (int i = 1; i < TEAM; i++) v.multiply(st, i);
    if (n + 1 < n_b + pages) begin(n + 1);
    finish_values(st);
    release(n);
  }

  wait_for(b.sums(), done.segments & 1);
#pragma unroll
  for (int scorer = 0; scorer < SCORERS; scorer++)
#pragma unroll
    for (int x = 0; x < NT; x++) {
      const float2 top = lds_float2(tops + ((1 + PROB_BUFFERS + scorer) * ROWS + x * 8 + 2 * (lane & 3)) * 4);
      const uint4 sums = lds128(shared + TEAM_SUMS + scorer * SUMS + ((me.index * NT + x) * 4 + (lane & 3)) * 16);
      const float factor[2] = {exp2_fast(top.x - st.top[x][0]), exp2_fast(top.y - st.top[x][1])};
#pragma unroll
      for (int i = 0; i < 4; i++) st.sums[x][0][i] += factor[i & 1] * __uint_as_float(word(sums, i));
    }
  arrive_together(b.sums_read());
  done.pages += pages, done.segments++;
}

// ---- Pages, by warps of their own ----------------------------------------------------------------------------------------
// Warps 0 and 1 bring planes of keys, the last of them with a page's scales, 2 and 3 planes of values.
DEV void bring_pages(const Params& p, const Segment& seg, const Part& part, const Pages& r, u32 ring, u32 shared,
                     const Member& me, PagesDone& done) {
  const bool of_values = me.index >= TEAM / 2;
  const int plane = me.index % 2, step_b = part.slice_b / TEAM, n_b = done.pages;
  const int pages = (r.slice_e + TEAM - 1) / TEAM - step_b;
  done.pages += pages, done.segments++;
  if (plane >= PLANES) return;
  static_assert(V_LOWER - K_LOWER == V_UPPER - K_UPPER, "planes of values follow those of keys");
  const Barriers b(shared);
  PlaneReader reader;
  const int offset = (plane ? K_LOWER : K_UPPER) + (of_values ? V_UPPER - K_UPPER : 0);
  reader.begin(p.pages + seg.head * p.head_stride + offset, p, part, r, step_b, true);
  const bool scales = !of_values && plane == PLANES - 1;
  int id = page_id(p, seg, r.ids.table, step_b, r.ids.last_page);
  if (of_values) wait_for(b.room(), done.segments + 1 & 1);
#pragma unroll 1
  for (int n = n_b; n < n_b + pages; n++) {
    const int count = n / SCORERS, of_keys = n % SCORERS * KEY_STEPS + count % KEY_STEPS;
    const int stage = of_values ? n % VALUE_STEPS : of_keys;
    const u32 to = ring + (of_values ? 0 : RING_KEYS) + stage * PAGE_CODES + plane * PAGE_PLANE;
    const u32 full = of_values ? b.values(stage) : b.keys(0, stage);
    const int round = of_values ? n / VALUE_STEPS : count / KEY_STEPS;
    const int first = reader.first(), bytes = reader.bytes();
    reader.find(id);
    id = page_id(p, seg, r.ids.table, ++reader.asked, r.ids.last_page);
    wait_for(of_values ? b.values_read(stage) : b.keys_read(0, stage), round + 1 & 1);
    if (elected()) {
      arrive_expecting(full, bytes + (scales ? PAGE_SCALES : 0));
      copy_bulk(to + first, reader.next + first, bytes, full);
      if (scales)
        copy_bulk(ring + RING_SCALES + stage * PAGE_SCALES, reader.next + K_SCALE - (plane ? K_LOWER : K_UPPER), PAGE_SCALES,
                  full);
    }
  }
}

// What those do who do not sum values, for all segments of a CTA.
template <bool BRINGS>
DEV void help_segments(const Params& p, const Segment (&edges)[2], int begin, int end, u32 ring, u32 shared,
                       const Member& me, int lane) {
  PagesDone done = {};
  for (int unit = begin; unit < end;) {
    const Segment seg = unit >= edges[1].begin ? edges[1] : unit < edges[0].end ? edges[0] : segment_at(p, unit);
    const int stop = min(end, seg.end);
    if (!is_empty(seg)) {
      const Part part = part_of_segment(seg, unit, stop);
      Pages pages;
      begin_pages(pages, p, seg, part, lane);
      if (part.slice_b < pages.slice_e) {
        if (BRINGS) bring_pages(p, seg, part, pages, ring, shared, me, done);
        else score_pages(p, seg, part, pages, ring, shared, me, lane, done);
      }
    }
    unit = stop;
  }
  wait_for_predecessor();  // all threads of a CTA merge
}
