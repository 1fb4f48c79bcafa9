// Convolutions of oneDNN as XLA's foreign functions, for the CPU; float32.
//
// Arrays are as XLA has them, [B, H, W, c] and [k, k, c, f], and are not copied; only
// kernels are, into the order that oneDNN's code for this processor wants. A call takes
// one thread, whatever OMP_NUM_THREADS says: clients are what cores share, and sums do
// not depend on how many there are.

#include <omp.h>

#include <array>
#include <map>
#include <oneapi/dnnl/dnnl.hpp>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using dnnl::memory;
using Tag = memory::format_tag;

namespace {

enum Kind { kForward, kInputGradient, kKernelGradient };

// Kind, x [4], kernel [4], y [4], stride, pads (top, bottom, left, right).
using Key = std::array<int64_t, 18>;

// A primitive, how its arrays lie, and the way of a kernel from or into its own order.
struct Convolution {
  dnnl::primitive run, reorder;
  memory::desc x, kernel, y, ordered;
};

const dnnl::engine& Engine() {
  static const auto* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *engine;
}

class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_;
};

// oneDNN names axes [B, c, H, W] and [f, c, k, k], wherever they lie.
memory::dims Image(const int64_t* d) { return {d[0], d[3], d[1], d[2]}; }
memory::dims Kernel(const int64_t* d) { return {d[3], d[2], d[0], d[1]}; }

memory::desc Lying(memory::dims dims, Tag tag) {
  return memory::desc(dims, memory::data_type::f32, tag);
}

Convolution Make(const Key& key) {
  const auto algorithm = dnnl::algorithm::convolution_direct;
  const auto training = dnnl::prop_kind::forward_training;
  Convolution made;
  made.x = Lying(Image(&key[1]), Tag::nhwc);
  made.kernel = Lying(Kernel(&key[5]), Tag::hwio);
  made.y = Lying(Image(&key[9]), Tag::nhwc);
  const auto any = Lying(Kernel(&key[5]), Tag::any);
  const memory::dims strides = {key[13], key[13]};
  const memory::dims before = {key[14], key[16]}, after = {key[15], key[17]};
  const dnnl::convolution_forward::primitive_desc forward(
      Engine(), training, algorithm, made.x, any, made.y, strides, before, after);
  if (key[0] == kForward) {
    made.ordered = forward.weights_desc();
    made.run = dnnl::convolution_forward(forward);
  } else if (key[0] == kInputGradient) {
    const dnnl::convolution_backward_data::primitive_desc gradient(
        Engine(), algorithm, made.x, any, made.y, strides, before, after, forward);
    made.ordered = gradient.weights_desc();
    made.run = dnnl::convolution_backward_data(gradient);
  } else {
    const dnnl::convolution_backward_weights::primitive_desc gradient(
        Engine(), algorithm, made.x, any, made.y, strides, before, after, forward);
    made.ordered = gradient.diff_weights_desc();
    made.run = dnnl::convolution_backward_weights(gradient);
  }
  if (made.ordered != made.kernel) {
    auto from = made.kernel, to = made.ordered;
    if (key[0] == kKernelGradient) std::swap(from, to);
    made.reorder = dnnl::reorder({Engine(), from, Engine(), to});
  }
  return made;
}

// A primitive has one scratchpad, so each thread has primitives of its own: devices
// compute at the same time.
const Convolution& Made(const Key& key) {
  static thread_local std::map<Key, Convolution> made;
  auto found = made.find(key);
  if (found == made.end()) found = made.emplace(key, Make(key)).first;
  return found->second;
}

void Run(Kind kind, void* x, void* kernel, void* y, const Key& key) {
  const OneThread one;
  static thread_local dnnl::stream stream(Engine());
  const Convolution& made = Made(key);
  const memory xs(made.x, Engine(), x), ys(made.y, Engine(), y);
  const memory given(made.kernel, Engine(), kernel);
  const bool reorders = made.ordered != made.kernel;
  const memory ordered = reorders ? memory(made.ordered, Engine()) : given;
  if (reorders && kind != kKernelGradient) {
    made.reorder.execute(stream, {{DNNL_ARG_FROM, given}, {DNNL_ARG_TO, ordered}});
  }
  const bool forward = kind == kForward;
  made.run.execute(
      stream,
      {{kind == kInputGradient ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, xs},
       {kind == kKernelGradient ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS, ordered},
       {forward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, ys}});
  if (reorders && kind == kKernelGradient) {
    made.reorder.execute(stream, {{DNNL_ARG_FROM, ordered}, {DNNL_ARG_TO, given}});
  }
  stream.wait();
}

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;
using Numbers = ffi::Span<const int64_t>;

// Two of x, kernel and y are arguments and the third is the result.
template <Kind kind>
ffi::Error Convolve(Array one, Array other, Numbers geometry, Result result) {
  Array x = one, kernel = other, y = *result;
  if (kind == kInputGradient) x = *result, kernel = other, y = one;
  if (kind == kKernelGradient) x = one, kernel = *result, y = other;
  Key key = {kind};
  auto end = key.begin() + 1;
  for (const auto& array : {x, kernel, y}) {
    const auto dims = array.dimensions();
    if (dims.size() != 4) return ffi::Error::InvalidArgument("not four axes");
    end = std::copy(dims.begin(), dims.end(), end);
  }
  if (geometry.size() != 5) return ffi::Error::InvalidArgument("not five numbers");
  std::copy(geometry.begin(), geometry.end(), end);
  try {
    Run(kind, x.untyped_data(), kernel.untyped_data(), y.untyped_data(), key);
  } catch (const dnnl::error& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

}  // namespace

#define HYPERJAX_HANDLER(name, kind)                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                  \
      name, Convolve<kind>,                                       \
      ffi::Ffi::Bind().Arg<Array>().Arg<Array>().Attr<Numbers>(   \
          "geometry").Ret<Array>())

HYPERJAX_HANDLER(Forward, kForward);
HYPERJAX_HANDLER(InputGradient, kInputGradient);
HYPERJAX_HANDLER(KernelGradient, kKernelGradient);

extern "C" const dnnl_version_t* Version() { return dnnl_version(); }
