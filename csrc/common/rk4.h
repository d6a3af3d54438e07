// The coefficients of the classical Runge-Kutta method of order 4, and the steps between the requested times.
#pragma once

#include "host_device.h"

namespace spigan {

constexpr int kRk4Stages = 4;

// `count` steps of size `length`, from time `start` to a requested time.
struct Interval {
  double start, length;
  std::int64_t count;
};

}  // namespace spigan

SPIGAN_COMMON_BEGIN

// Stage s evaluates the field at time t + node(s) dt and state h + node(s) dt k_{s-1}: the coefficient a_{s,s-1} equals
// the node, and all others are 0.
SPIGAN_HD constexpr double rk4_node(int stage) { return stage == 0 ? 0.0 : stage == 3 ? 1.0 : 0.5; }

// h(t + dt) = h + dt sum_s weight(s) k_s.
SPIGAN_HD constexpr double rk4_weight(int stage) { return stage == 0 || stage == 3 ? 1.0 / 6.0 : 1.0 / 3.0; }

SPIGAN_COMMON_END
