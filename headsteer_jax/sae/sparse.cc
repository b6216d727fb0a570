// Products with matrices of which each row has K entries among F, for CPUs: XLA has only dense products and scalar
// scatters.
// Each function is one XLA FFI call (docs.jax.dev/en/latest/ffi.html); sparse.py compiles and binds them.
//
// Leading axes (those that vmap adds) are a batch of members, each computed independently. The work is cut into pieces
// whose results do not depend on the thread that computes them: the bits are the same on any number of threads.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
typedef float Lane __attribute__((vector_size(32), aligned(4)));  // eight at once, at any address
typedef int32_t Mask __attribute__((vector_size(32), aligned(4)));
constexpr int64_t kLane = 8;

// Runs work(0) .. work(pieces - 1) on the pool and on the calling thread. As the latter takes pieces as well, it never
// waits for a thread that waits for it.
void Parallel(ffi::ThreadPool& pool, int64_t pieces, const std::function<void(int64_t)>& work) {
  struct State {
    std::function<void(int64_t)> work;
    int64_t pieces;
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable finished;
    void Take() {
      int64_t mine = 0;
      for (int64_t piece; (piece = next.fetch_add(1)) < pieces; ++mine) work(piece);
      if (mine == 0) return;
      std::lock_guard<std::mutex> lock(mutex);
      done += mine;
      if (done == pieces) finished.notify_all();
    }
  };
  auto state = std::make_shared<State>();
  state->work = work;
  state->pieces = pieces;
  for (int64_t helper = 1; helper < std::min<int64_t>(pool.num_threads(), pieces); ++helper) {
    pool.Schedule([state] { state->Take(); });
  }
  state->Take();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done == pieces; });
}

// The product of all axes but the last `inner` ones.
template <typename Dimensions>
int64_t Members(const Dimensions& dimensions, size_t inner) {
  int64_t members = 1;
  for (size_t axis = 0; axis + inner < dimensions.size(); ++axis) members *= dimensions[axis];
  return members;
}

void AddTo(float* sum, const float* row, float weight, int64_t width) {
  int64_t d = 0;
  for (; d + kLane <= width; d += kLane) {
    *reinterpret_cast<Lane*>(sum + d) += weight * *reinterpret_cast<const Lane*>(row + d);
  }
  for (; d < width; ++d) sum[d] += weight * row[d];
}

float Dot(const float* a, const float* b, int64_t width) {
  Lane first = {}, second = {};
  int64_t d = 0;
  for (; d + 2 * kLane <= width; d += 2 * kLane) {
    first += *reinterpret_cast<const Lane*>(a + d) * *reinterpret_cast<const Lane*>(b + d);
    second += *reinterpret_cast<const Lane*>(a + d + kLane) * *reinterpret_cast<const Lane*>(b + d + kLane);
  }
  first += second;
  float sum = 0;
  for (int64_t lane = 0; lane < kLane; ++lane) sum += first[lane];
  for (; d < width; ++d) sum += a[d] * b[d];
  return sum;
}

constexpr int64_t kRows = 32;  // images in a piece

// The k largest of ReLU(a + bias) in each row, in descending order; of equal values the first. Places from `active` on,
// and those for which no value above 0 remains, hold value 0 and latent 0. A row with a NaN becomes NaN.
ffi::Error TopK(ffi::ThreadPool pool, Floats a, Floats bias, Ints active, ffi::Result<Floats> values,
                ffi::Result<Ints> latents) {
  const auto shape = a.dimensions();
  const int64_t rows = shape[shape.size() - 2], F = shape.back(), K = values->dimensions().back();
  const int64_t pieces = (rows + kRows - 1) / kRows, members = Members(shape, 2);
  // The K-th largest of the maxima of `lanes` groups is at most the K-th largest value, and close to it.
  int64_t lanes = 128;
  while (lanes < 4 * K) lanes *= 2;
  Parallel(pool, members * pieces, [&, lanes](int64_t piece) {
    const int64_t member = piece / pieces, begin = piece % pieces * kRows;
    const float* member_bias = bias.typed_data() + member * F;
    const int64_t k = std::min<int64_t>(active.typed_data()[member], K);
    const auto nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> row(F), most(lanes);
    std::vector<std::pair<float, int32_t>> candidates;
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) {
      const float* a_row = a.typed_data() + (member * rows + r) * F;
      std::fill(most.begin(), most.end(), 0.0f);
      float* value = values->typed_data() + (member * rows + r) * K;
      int32_t* latent = latents->typed_data() + (member * rows + r) * K;
      Mask unordered = {};
      int32_t broken = 0;
      int64_t f = 0;
      for (; f + kLane <= F; f += kLane) {
        Lane a_f = *reinterpret_cast<const Lane*>(a_row + f) + *reinterpret_cast<const Lane*>(member_bias + f);
        unordered |= a_f != a_f;
        a_f = a_f > 0.0f ? a_f : Lane{};
        *reinterpret_cast<Lane*>(row.data() + f) = a_f;
        Lane& group = *reinterpret_cast<Lane*>(most.data() + f % lanes);
        group = a_f > group ? a_f : group;
      }
      for (; f < F; ++f) {
        broken |= a_row[f] + member_bias[f] != a_row[f] + member_bias[f];
        row[f] = std::max(a_row[f] + member_bias[f], 0.0f);
        most[f % lanes] = std::max(most[f % lanes], row[f]);
      }
      for (int64_t lane = 0; lane < kLane; ++lane) broken |= unordered[lane];
      if (broken) {  // so that the loss becomes NaN
        std::fill(value, value + K, nan);
        std::fill(latent, latent + K, 0);
        continue;
      }
      float least = 0.0f;
      if (k > 0 && k <= lanes) {
        std::nth_element(most.begin(), most.begin() + (k - 1), most.end(), std::greater<float>());
        least = most[k - 1];
      }
      candidates.clear();
      for (f = 0; f + kLane <= F; f += kLane) {
        const Lane a_f = *reinterpret_cast<const Lane*>(row.data() + f);
        const Mask hit = a_f >= least;
        int32_t any = 0;
        for (int64_t lane = 0; lane < kLane; ++lane) any |= hit[lane];
        if (!any) continue;
        for (int64_t lane = 0; lane < kLane; ++lane) {
          if (a_f[lane] >= least && a_f[lane] > 0.0f) candidates.emplace_back(a_f[lane], f + lane);
        }
      }
      for (; f < F; ++f) {
        if (row[f] >= least && row[f] > 0.0f) candidates.emplace_back(row[f], f);
      }
      const int64_t count = std::min<int64_t>(k, candidates.size());
      const auto before = [](const auto& x, const auto& y) {
        return x.first > y.first || (x.first == y.first && x.second < y.second);
      };
      std::nth_element(candidates.begin(), candidates.begin() + count, candidates.end(), before);
      std::sort(candidates.begin(), candidates.begin() + count, before);
      for (int64_t j = 0; j < K; ++j) {
        value[j] = j < count ? candidates[j].first : 0.0f;
        latent[j] = j < count ? candidates[j].second : 0;
      }
    }
  });
  return ffi::Error::Success();
}

// sum_j z[b, j] W[latents[b, j]], [B, D].
ffi::Error SumRows(ffi::ThreadPool pool, Floats z, Ints latents, Floats W, ffi::Result<Floats> sums) {
  const auto shape = z.dimensions(), rows_shape = W.dimensions();
  const int64_t B = shape[shape.size() - 2], K = shape.back();
  const int64_t F = rows_shape[rows_shape.size() - 2], D = rows_shape.back();
  const int64_t pieces = (B + kRows - 1) / kRows;
  Parallel(pool, Members(shape, 2) * pieces, [&](int64_t piece) {
    const int64_t member = piece / pieces, begin = piece % pieces * kRows;
    const float* rows = W.typed_data() + member * F * D;
    for (int64_t b = begin; b < std::min(begin + kRows, B); ++b) {
      const int64_t at = (member * B + b) * K;
      float* sum = sums->typed_data() + (member * B + b) * D;
      std::fill(sum, sum + D, 0.0f);
      for (int64_t j = 0; j < K; ++j) {
        const float weight = z.typed_data()[at + j];
        if (weight != 0.0f) AddTo(sum, rows + latents.typed_data()[at + j] * D, weight, D);
      }
    }
  });
  return ffi::Error::Success();
}

// g[b] . W[latents[b, j]], [B, K].
ffi::Error DotRows(ffi::ThreadPool pool, Floats g, Ints latents, Floats W, ffi::Result<Floats> dots) {
  const auto shape = latents.dimensions(), rows_shape = W.dimensions();
  const int64_t B = shape[shape.size() - 2], K = shape.back();
  const int64_t F = rows_shape[rows_shape.size() - 2], D = rows_shape.back();
  const int64_t pieces = (B + kRows - 1) / kRows;
  Parallel(pool, Members(shape, 2) * pieces, [&](int64_t piece) {
    const int64_t member = piece / pieces, begin = piece % pieces * kRows;
    const float* rows = W.typed_data() + member * F * D;
    for (int64_t b = begin; b < std::min(begin + kRows, B); ++b) {
      const int64_t at = (member * B + b) * K;
      const float* g_row = g.typed_data() + (member * B + b) * D;
      for (int64_t j = 0; j < K; ++j) {
        dots->typed_data()[at + j] = Dot(g_row, rows + latents.typed_data()[at + j] * D, D);
      }
    }
  });
  return ffi::Error::Success();
}

// sum over (b, j) with latents[b, j] = f of z[b, j] g[b], [F, D]; and of z[b, j] alone, [F].
ffi::Error OuterRows(ffi::ThreadPool pool, Floats z, Ints latents, Floats g, ffi::Result<Floats> outer,
                     ffi::Result<Floats> sums) {
  const auto shape = z.dimensions(), out = outer->dimensions();
  const int64_t B = shape[shape.size() - 2], K = shape.back(), F = out[out.size() - 2], D = out.back();
  const int64_t members = Members(shape, 2), pieces = 32;
  // for each latent the (b, j) that refer to it, in the order of b
  std::vector<int32_t> first(members * (F + 1)), entries(members * B * K);
  Parallel(pool, members, [&](int64_t member) {
    const float* weights = z.typed_data() + member * B * K;
    const int32_t* named = latents.typed_data() + member * B * K;
    int32_t* start = first.data() + member * (F + 1);
    for (int64_t e = 0; e < B * K; ++e) start[named[e] + 1] += weights[e] != 0.0f;
    for (int64_t f = 0; f < F; ++f) start[f + 1] += start[f];
    std::vector<int32_t> next(start, start + F);
    for (int64_t e = 0; e < B * K; ++e) {
      if (weights[e] != 0.0f) entries[member * B * K + next[named[e]]++] = e;
    }
  });
  Parallel(pool, members * pieces, [&](int64_t piece) {
    const int64_t member = piece / pieces;
    const int32_t* start = first.data() + member * (F + 1);
    const int64_t total = start[F];
    // pieces with equal numbers of entries, not of latents
    const auto cut = [&](int64_t part) {
      return part == pieces ? F : std::lower_bound(start, start + F, total * part / pieces) - start;
    };
    for (int64_t f = cut(piece % pieces); f < cut(piece % pieces + 1); ++f) {
      float* row = outer->typed_data() + (member * F + f) * D;
      std::fill(row, row + D, 0.0f);
      float sum = 0.0f;
      for (int64_t at = start[f]; at < start[f + 1]; ++at) {
        const int64_t e = entries[member * B * K + at];
        const float weight = z.typed_data()[member * B * K + e];
        AddTo(row, g.typed_data() + (member * B + e / K) * D, weight, D);
        sum += weight;
      }
      sums->typed_data()[member * F + f] = sum;
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(headsteer_top_k, TopK,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Ints>()
                                  .Ret<Floats>().Ret<Ints>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(headsteer_sum_rows, SumRows,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Ints>().Arg<Floats>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(headsteer_dot_rows, DotRows,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Ints>().Arg<Floats>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(headsteer_outer_rows, OuterRows,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Ints>().Arg<Floats>()
                                  .Ret<Floats>().Ret<Floats>());
