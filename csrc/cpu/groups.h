// Rows of many short groups (depthwise and small grouped convolutions, channels innermost): what a kernel has once a group is
// laid out once a channel, a block of groups at a time, so that vectors go along the channels of several groups.
// Included by *_kernels.cpp only, inside one instruction set's namespace.
#pragma once

#include "element.h"

namespace bcos::cpu::BCOS_ISA {

// Whether groups are too short to fill vectors by themselves.
inline bool has_short_groups(const Layout& l) { return l.groups > 1 && l.channels < 16 * l.groups; }

// f(group, channel, groups, channels) for blocks of whole groups, at most kBlock channels each: the first ones and how many.
template <class F>
inline void for_blocks_of_groups(const Layout& l, F f) {
  const int64_t per_group = l.channels / l.groups, most = kBlock / per_group;
  for (int64_t group = 0; group < l.groups; group += most) {
    const int64_t groups = l.groups - group < most ? l.groups - group : most;
    f(group, group * per_group, groups, groups * per_group);
  }
}

// to[c] = from[g] for every channel c of group g.
template <class W>
inline void repeat(W* __restrict to, const W* __restrict from, int64_t groups, int64_t per_group) {
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t c = 0; c < per_group; c++) to[g * per_group + c] = from[g];
  }
}

// to[c] = 1 / n[g] for every channel c of group g.
template <class W>
inline void reciprocals(W* __restrict to, const W* __restrict n, int64_t groups, int64_t per_group) {
  if (per_group > 1) repeat(to, n, groups, per_group);
  const W* from = per_group > 1 ? to : n;
#pragma omp simd
  for (int64_t c = 0; c < groups * per_group; c++) to[c] = 1 / from[c];
}

// values[g] = sum of values over the channels of group g.
template <class W>
inline void sum_groups(W* values, int64_t groups, int64_t per_group) {
  if (per_group == 1) return;
  for (int64_t g = 0; g < groups; g++) {
    W sum = 0;
    for (int64_t c = 0; c < per_group; c++) sum += values[g * per_group + c];
    values[g] = sum;
  }
}

}  // namespace bcos::cpu::BCOS_ISA
