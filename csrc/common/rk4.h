// The classical Runge-Kutta method of order 4 as data, and the steps that lead through the requested times.
#pragma once

#include "host_device.h"

namespace spigan {

constexpr int kRk4Stages = 4;

// `count` equal steps of size `length` from `start` to a requested time.
struct Interval {
  double start, length;
  std::int64_t count;
};

}  // namespace spigan

SPIGAN_COMMON_BEGIN

// Stage s evaluates the field at t + node(s) dt and h + node(s) dt k_{s-1}: a_{s,s-1} equals the node, all other
// coefficients are 0.
SPIGAN_HD constexpr double rk4_node(int stage) { return stage == 0 ? 0.0 : stage == 3 ? 1.0 : 0.5; }

// h(t + dt) = h + dt sum_s weight(s) k_s.
SPIGAN_HD constexpr double rk4_weight(int stage) { return stage == 0 || stage == 3 ? 1.0 / 6.0 : 1.0 / 3.0; }

SPIGAN_COMMON_END
