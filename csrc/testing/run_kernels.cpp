// Executes every CUDA kernel on the CPU at small sizes and compares it with simple loops. Returns 1 if they differ.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "common/philox.h"
#include "cuda/cuda_kernels.h"
#include "cuda_runtime.h"

namespace {

using namespace spigan;

int failures = 0;

constexpr double kNormalError = 7.4e-6;  // see cuda/box_muller.h

// `tolerance` is relative to 1 + |expected|. NaN never compares equal.
template <class Actual>
void compare(const char* what, const std::vector<Actual>& actual, const std::vector<double>& expected,
             double tolerance) {
  double worst = actual.size() == expected.size() ? 0.0 : std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < std::min(actual.size(), expected.size()); ++i) {
    double value;
    if constexpr (sizeof(Actual) == 2) {
      value = to_float(actual[i]);
    } else {
      value = actual[i];
    }
    const double error = std::fabs(value - expected[i]) / (1.0 + std::fabs(expected[i]));
    if (!(error <= worst)) worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
  }
  const bool passed = worst <= tolerance;
  failures += passed ? 0 : 1;
  std::printf("%s  %-60s  error %.1e, allowed %.1e\n", passed ? "pass" : "FAIL", what, worst, tolerance);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL  %s: %s\n", what, cudaGetErrorString(error));
  ++failures;
}

template <class T>
std::vector<T> unwritten(std::size_t size) {
  std::vector<T> values(size);
  if (size != 0) std::memset(static_cast<void*>(values.data()), 0xFF, size * sizeof(T));
  return values;
}

// Returns a pseudorandom number in [-1, 1).
double some(std::uint64_t index) {
  return static_cast<double>(philox_block(2024, index).x0) * std::ldexp(1.0, -31) - 1.0;
}

double normal(std::uint64_t seed, std::uint64_t element) {
  const Philox4x32 words = philox_block(seed, element / 4);
  const bool second = element % 4 >= 2;
  const double u1 = (second ? words.x2 : words.x0) * std::ldexp(1.0, -32) + std::ldexp(1.0, -33);
  const double u2 = (second ? words.x3 : words.x1) * std::ldexp(1.0, -32);
  const double radius = std::sqrt(-2.0 * std::log(u1)), angle = 8.0 * std::atan(1.0) * u2;
  return radius * (element % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

template <class T>
void test_philox_normal(Dtype dtype, std::int64_t rows, std::int64_t row_numel, std::uint64_t offset,
                        double tolerance) {
  std::vector<std::int64_t> seeds;
  for (std::int64_t i = 0; i < rows; ++i) seeds.push_back(7 * i - 3);
  const std::size_t numel = static_cast<std::size_t>(rows * row_numel);
  std::vector<T> out = unwritten<T>(numel);
  check(cuda::philox_normal({out.data(), dtype, seeds.data(), rows, row_numel, offset}, nullptr), "philox_normal");
  std::vector<double> expected;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < row_numel; ++j) {
      expected.push_back(normal(static_cast<std::uint64_t>(seeds[static_cast<std::size_t>(i)]),
                                offset + static_cast<std::uint64_t>(j)));
    }
  }
  char what[100];
  std::snprintf(what, sizeof(what), "philox_normal [%d, %d], offset %llu, %d bytes", static_cast<int>(rows),
                static_cast<int>(row_numel), static_cast<unsigned long long>(offset), static_cast<int>(sizeof(T)));
  compare(what, out, expected, tolerance);
}

void test_path_interpolate(std::int64_t images, std::int64_t rows, std::int64_t width, int times, std::uint64_t offset,
                           bool flips, bool given_noise) {
  const std::size_t numel = static_cast<std::size_t>(images * rows * width);
  std::vector<std::uint8_t> x0, flip;
  std::vector<float> noise;
  for (std::size_t e = 0; e < numel; ++e) {
    x0.push_back(static_cast<std::uint8_t>(127.5 + 127.5 * some(e)));
    noise.push_back(static_cast<float>(given_noise ? some(e + 1000) : normal(5, offset + e)));
  }
  for (std::int64_t i = 0; i < images; ++i) flip.push_back(static_cast<std::uint8_t>(i % 2));
  PathTimes path = {times, {}, {}};
  for (int k = 0; k < times; ++k) {
    path.t[k] = static_cast<float>(k + 1) / static_cast<float>(times);
    path.one_minus_t[k] = 1.0f - path.t[k];
  }
  std::vector<float> x_T = unwritten<float>(numel), points = unwritten<float>(static_cast<std::size_t>(times) * numel);
  check(cuda::path_interpolate({x_T.data(), points.data(), Dtype::kFloat32, x0.data(), Dtype::kUInt8,
                                given_noise ? noise.data() : nullptr, flips ? flip.data() : nullptr, images, rows,
                                width, path, 0.0065716f, 0.9999784f, 5, offset},
                               nullptr),
        "path_interpolate");
  std::vector<double> clean, expected_x_T, expected;
  for (std::size_t e = 0; e < numel; ++e) {
    const std::size_t w = static_cast<std::size_t>(width), row = e / w * w;
    const bool mirrored = flips && flip[e / static_cast<std::size_t>(rows * width)] != 0;
    clean.push_back(x0[mirrored ? row + (row + w - 1 - e) : e] / 127.5 - 1.0);
    expected_x_T.push_back(0.0065716 * clean[e] + 0.9999784 * static_cast<double>(noise[e]));
  }
  for (int k = 0; k < times; ++k) {
    for (std::size_t e = 0; e < numel; ++e) {
      const double t = static_cast<double>(path.t[k]);
      expected.push_back(t * clean[e] + (1.0 - t) * expected_x_T[e]);
    }
  }
  char what[100];
  std::snprintf(what, sizeof(what), "path_interpolate [%d, %d, %d], K %d%s%s", static_cast<int>(images),
                static_cast<int>(rows), static_cast<int>(width), times, flips ? ", flips" : "",
                given_noise ? ", noise given" : "");
  const double tolerance = given_noise ? 2e-6 : kNormalError;
  compare(what, x_T, expected_x_T, tolerance);
  compare(what, points, expected, tolerance);
}

std::vector<float> some_floats(std::size_t size, std::uint64_t first) {
  std::vector<float> values;
  for (std::size_t i = 0; i < size; ++i) values.push_back(static_cast<float>(some(first + i)));
  return values;
}

// In float32, with bias and drawn noise. taps = 0 means no filter. The result has the size of x.
void test_fir_bias_act(std::int64_t images, std::int64_t height, std::int64_t width, std::int64_t channels,
                       std::int64_t taps, std::int64_t rgb_channels, int threads) {
  cuda_on_cpu::set_device({9, 1, threads, 64 << 10, 1});
  const std::size_t pixels = static_cast<std::size_t>(images * height * width), c = static_cast<std::size_t>(channels);
  const std::size_t colors = static_cast<std::size_t>(rgb_channels);
  const std::vector<float> x = some_floats(pixels * c, 0), bias = some_floats(c, 5000);
  const std::vector<float> filter = some_floats(static_cast<std::size_t>(taps * taps), 6000);
  const std::vector<float> rgb_weight = some_floats(static_cast<std::size_t>(images) * colors * c, 7000);
  std::vector<float> out = unwritten<float>(pixels * c), rgb = unwritten<float>(pixels * colors);
  const std::int64_t seed = 11, pad = taps / 2;
  FirBiasAct args = {};
  args.end.out = out.data();
  args.end.dtype = Dtype::kFloat32;
  args.end.images = images;
  args.end.height = args.x_height = height;
  args.end.width = args.x_width = width;
  args.end.channels = channels;
  args.end.seed = &seed;
  args.end.bias = bias.data();
  args.end.slope = 0.2;
  args.end.gain = 1.5;
  args.end.clamp = 2.0;
  args.end.rgb = rgb_channels != 0 ? rgb.data() : nullptr;
  args.end.rgb_weight = rgb_weight.data();
  args.end.rgb_channels = rgb_channels;
  args.x = x.data();
  args.filter = taps != 0 ? filter.data() : nullptr;
  args.taps = taps;
  args.up = args.down = 1;
  args.pad = pad;
  args.fir_gain = 2.0;
  check(cuda::fir_bias_act(args, nullptr), "fir_bias_act");

  const auto filtered = [&](std::int64_t image, std::int64_t row, std::int64_t column, std::size_t channel) {
    double sum = 0.0;
    for (std::int64_t j = 0; j < taps; ++j) {
      for (std::int64_t i = 0; i < taps; ++i) {
        const std::int64_t y = row + j - pad, at = column + i - pad;
        if (y < 0 || y >= height || at < 0 || at >= width) continue;
        const double value = x[static_cast<std::size_t>((image * height + y) * width + at) * c + channel];
        sum += 2.0 * static_cast<double>(filter[static_cast<std::size_t>(j * taps + i)]) * value;
      }
    }
    return sum;
  };
  std::vector<double> expected, expected_rgb(pixels * colors);
  for (std::size_t p = 0; p < pixels; ++p) {
    const std::int64_t at = static_cast<std::int64_t>(p), image = at / (height * width);
    for (std::size_t k = 0; k < c; ++k) {
      double v = taps != 0 ? filtered(image, at / width % height, at % width, k) : static_cast<double>(x[p * c + k]);
      v += normal(11, p) + static_cast<double>(bias[k]);
      expected.push_back(std::max(-2.0, std::min(2.0, 1.5 * (v < 0.0 ? 0.2 * v : v))));
      for (std::size_t r = 0; r < colors; ++r) {
        const double weight = rgb_weight[(static_cast<std::size_t>(image) * colors + r) * c + k];
        expected_rgb[p * colors + r] += weight * expected.back();
      }
    }
  }
  char what[100];
  std::snprintf(what, sizeof(what), "fir_bias_act [%d, %d, %d, %d], %d taps, %d rgb, %d threads",
                static_cast<int>(images), static_cast<int>(height), static_cast<int>(width),
                static_cast<int>(channels), static_cast<int>(taps), static_cast<int>(rgb_channels), threads);
  const double tolerance = 1.5 * kNormalError;  // gain = 1.5
  compare(what, out, expected, tolerance);
  if (rgb_channels != 0) compare(what, rgb, expected_rgb, tolerance);
}

void test_bias_act_backward(std::int64_t images, std::int64_t pixels, std::int64_t channels, std::int64_t parts,
                            bool sum_over_channels, int threads) {
  cuda_on_cpu::set_device({9, 1, threads, 64 << 10, 1});
  const std::size_t rows = static_cast<std::size_t>(images * pixels), c = static_cast<std::size_t>(channels);
  const std::size_t sums = static_cast<std::size_t>(images * parts) * c;
  const std::vector<float> grad = some_floats(rows * c, 0), out = some_floats(rows * c, 9000);
  const std::vector<float> x = some_floats(rows * c, 20000);
  const std::vector<float> factor = some_floats(static_cast<std::size_t>(images) * c, 30000);
  std::vector<float> grad_x = unwritten<float>(rows * c), sum_u = unwritten<float>(sums);
  std::vector<float> sum_ux = unwritten<float>(sums), sum_c = unwritten<float>(rows);
  BiasActBackward args = {};
  args.grad_x = grad_x.data();
  args.sum_u = sum_u.data();
  args.sum_ux = sum_ux.data();
  args.sum_c = sum_over_channels ? sum_c.data() : nullptr;
  args.dtype = Dtype::kFloat32;
  args.grad = grad.data();
  args.out = out.data();
  args.x = x.data();
  args.factor = factor.data();
  args.slope = 0.2;
  args.gain = 1.5;
  args.clamp = 0.75;
  args.images = images;
  args.pixels = pixels;
  args.channels = channels;
  args.parts = parts;
  check(cuda::bias_act_backward(args, nullptr), "bias_act_backward");

  const std::size_t length = static_cast<std::size_t>((pixels + parts - 1) / parts);
  std::vector<double> expected(rows * c), expected_u(sums), expected_ux(sums), expected_c(rows);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::size_t image = row / static_cast<std::size_t>(pixels), pixel = row % static_cast<std::size_t>(pixels);
    for (std::size_t k = 0; k < c; ++k) {
      const std::size_t at = row * c + k, sum = (image * static_cast<std::size_t>(parts) + pixel / length) * c + k;
      const double y = out[at], derivative = std::fabs(y) >= 0.75 ? 0.0 : y > 0.0 ? 1.5 : 0.3;
      const double u = derivative * static_cast<double>(grad[at]);
      expected[at] = static_cast<double>(factor[image * c + k]) * u;
      expected_u[sum] += u;
      expected_ux[sum] += u * static_cast<double>(x[at]);
      expected_c[row] += u;
    }
  }
  char what[100];
  std::snprintf(what, sizeof(what), "bias_act_backward [%d, %d, %d], %d parts%s, %d threads", static_cast<int>(images),
                static_cast<int>(pixels), static_cast<int>(channels), static_cast<int>(parts),
                sum_over_channels ? ", sums over channels" : "", threads);
  compare(what, grad_x, expected, 2e-6);
  compare(what, sum_u, expected_u, 2e-6);
  compare(what, sum_ux, expected_ux, 2e-6);
  if (sum_over_channels) compare(what, sum_c, expected_c, 2e-6);
}

struct Mlp {
  std::size_t batch, dim, layers;
  std::vector<double> h0, weight, bias, time_weight;

  Mlp(std::size_t batch_, std::size_t dim_, std::size_t layers_) : batch(batch_), dim(dim_), layers(layers_) {
    std::uint64_t index = 0;
    // Rounded to bfloat16, whose values are exact in the other types.
    const auto fill = [&index](std::vector<double>& values, std::size_t size, double scale) {
      for (std::size_t i = 0; i < size; ++i) {
        const float value = static_cast<float>(scale * some(++index));
        values.push_back(static_cast<double>(to_float(from_float<bfloat16>(value))));
      }
    };
    fill(h0, batch * dim, 1.0);
    fill(weight, layers * dim * dim, 2.0 / std::sqrt(static_cast<double>(dim)));
    fill(bias, layers * dim, 0.5);
    fill(time_weight, layers * dim, 0.5);
  }

  std::vector<double> field(const std::vector<double>& h, double t) const {
    std::vector<double> y = h;
    for (std::size_t l = 0; l < layers; ++l) {
      std::vector<double> next(dim);
      for (std::size_t o = 0; o < dim; ++o) {
        double sum = bias[l * dim + o] + t * time_weight[l * dim + o];
        for (std::size_t k = 0; k < dim; ++k) sum += weight[(l * dim + o) * dim + k] * y[k];
        next[o] = l + 1 < layers ? std::tanh(sum) : sum;
      }
      y = next;
    }
    return y;
  }

  // Returns the states [2, batch, dim] after a step of 0.5 and a further step of 0.25.
  std::vector<double> solve() const {
    std::vector<double> out(2 * batch * dim);
    for (std::size_t row = 0; row < batch; ++row) {
      std::vector<double> h(h0.begin() + static_cast<std::ptrdiff_t>(row * dim),
                            h0.begin() + static_cast<std::ptrdiff_t>((row + 1) * dim));
      double t = 0.0;
      for (std::size_t slot = 0; slot < 2; ++slot) {
        const double dt = slot == 0 ? 0.5 : 0.25;
        const auto moved = [&h](const std::vector<double>& k, double step) {
          std::vector<double> x = h;
          for (std::size_t i = 0; i < x.size(); ++i) x[i] += step * k[i];
          return x;
        };
        const std::vector<double> k1 = field(h, t), k2 = field(moved(k1, dt / 2), t + dt / 2),
                                  k3 = field(moved(k2, dt / 2), t + dt / 2), k4 = field(moved(k3, dt), t + dt);
        for (std::size_t i = 0; i < dim; ++i) {
          h[i] += dt / 6 * (k1[i] + 2 * k2[i] + 2 * k3[i] + k4[i]);
          out[(slot * batch + row) * dim + i] = h[i];
        }
        t += dt;
      }
    }
    return out;
  }
};

template <class T>
std::vector<T> as(const std::vector<double>& values) {
  std::vector<T> result;
  for (const double value : values) result.push_back(from_float<T>(static_cast<float>(value)));
  return result;
}

template <class T>
void test_rk4_mlp(Dtype dtype, std::size_t batch, std::size_t dim, std::size_t layers,
                  const cuda_on_cpu::Device& device, double tolerance) {
  cuda_on_cpu::set_device(device);
  const Mlp mlp(batch, dim, layers);
  const std::vector<T> h0 = as<T>(mlp.h0), bias = as<T>(mlp.bias), time_weight = as<T>(mlp.time_weight);
  std::vector<T> weight = as<T>(mlp.weight), out = unwritten<T>(2 * batch * dim);
  const Interval intervals[2] = {{0.0, 0.5, 1}, {0.5, 0.25, 1}};
  const auto b = static_cast<std::int64_t>(batch), d = static_cast<std::int64_t>(dim);
  cuda::Rk4Plan plan;
  check(cuda::plan_rk4_mlp(dtype, b, d, static_cast<std::int64_t>(layers), &plan), "plan_rk4_mlp");
  std::vector<double> workspace = unwritten<double>(plan.workspace_bytes / sizeof(double) + 1);
  check(cuda::rk4_mlp({out.data(), dtype, h0.data(), weight.data(), bias.data(), time_weight.data(), b, d,
                       static_cast<std::int64_t>(layers), intervals, 2, false, Activation::kTanh, workspace.data()},
                      nullptr),
        "rk4_mlp");
  char what[120];
  std::snprintf(what, sizeof(what), "rk4_mlp [%d, %d], L %d, %d bytes, %s of %d, %d groups, %d rows, weights %s%s",
                static_cast<int>(batch), static_cast<int>(dim), static_cast<int>(layers), static_cast<int>(sizeof(T)),
                plan.cluster ? "cluster" : "workspace", plan.members, plan.groups, plan.rows,
                plan.weights_in_shared ? "shared" : "global", plan.matrix ? ", matrix unit" : "");
  compare(what, out, mlp.solve(), tolerance);
}

}  // namespace

int main() {
  cuda_on_cpu::set_device({9, 1, 32, 64 << 10, 1});
  test_philox_normal<float>(Dtype::kFloat32, 2, 64, 0, kNormalError);
  test_philox_normal<float>(Dtype::kFloat32, 3, 5, 0xFFFFFFFE, kNormalError);
  test_philox_normal<bfloat16>(Dtype::kBFloat16, 2, 12, 4, 4e-3);
  test_philox_normal<double>(Dtype::kFloat64, 1, 9, 1, kNormalError);
  test_path_interpolate(2, 3, 8, 2, 0, true, false);
  test_path_interpolate(2, 2, 5, 3, 6, true, false);
  test_path_interpolate(1, 2, 12, 1, 0, false, true);

  test_fir_bias_act(2, 3, 5, 8, 0, 0, 32);
  test_fir_bias_act(2, 2, 3, 3, 0, 3, 64);
  test_fir_bias_act(1, 3, 2, 160, 0, 3, 64);  // lanes loop over the channels twice
  test_fir_bias_act(1, 5, 6, 8, 4, 0, 64);
  test_fir_bias_act(1, 4, 5, 3, 3, 0, 64);
  test_fir_bias_act(1, 3, 5, 8, 4, 2, 64);
  test_bias_act_backward(2, 9, 8, 2, true, 64);
  test_bias_act_backward(1, 5, 40, 1, true, 64);
  test_bias_act_backward(1, 5, 35, 1, true, 64);  // a block loops over the channels twice
  test_bias_act_backward(1, 66, 4, 66, false, 64);  // a block has two parts

  const double f32 = 5e-6, bf16 = 2e-2;
  //                                                       major, multiprocessors, threads, shared memory, cluster
  test_rk4_mlp<float>(Dtype::kFloat32, 1, 16, 2, {9, 4, 32, 64 << 10, 4}, f32);
  test_rk4_mlp<float>(Dtype::kFloat32, 11, 16, 2, {9, 2, 64, 64 << 10, 2}, f32);
  test_rk4_mlp<bfloat16>(Dtype::kBFloat16, 5, 16, 1, {9, 2, 32, 64 << 10, 2}, bf16);
  test_rk4_mlp<float>(Dtype::kFloat32, 3, 16, 2, {8, 2, 64, 64 << 10, 1}, f32);
  test_rk4_mlp<float>(Dtype::kFloat32, 9, 32, 2, {8, 2, 32, 7 << 10, 1}, f32);
  test_rk4_mlp<float>(Dtype::kFloat32, 3, 32, 2, {9, 2, 32, 6 << 10, 2}, f32);
  // Shared memory holds 8 of 19 rows, then 1 of 3.
  test_rk4_mlp<float>(Dtype::kFloat32, 19, 16, 1, {9, 1, 32, 3600, 1}, f32);
  test_rk4_mlp<float>(Dtype::kFloat32, 19, 16, 1, {8, 1, 64, 3000, 1}, f32);
  test_rk4_mlp<float>(Dtype::kFloat32, 5, 16, 1, {9, 2, 32, 1000, 2}, f32);
  // The matrix unit.
  test_rk4_mlp<float>(Dtype::kFloat32, 19, 32, 2, {9, 2, 64, 64 << 10, 2, true}, f32);
  test_rk4_mlp<float>(Dtype::kFloat32, 3, 32, 2, {8, 2, 64, 64 << 10, 1, true}, f32);
  std::printf(failures == 0 ? "all equal\n" : "%d differ\n", failures);
  return failures == 0 ? 0 : 1;
}
