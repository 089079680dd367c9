// The entry points of csrc/cpu with sizes and values that bytes decide, without torch: compiled with a sanitizer by
// tests/fuzz/sanitize.sh and for AFL by tests/fuzz/afl.sh; with clang's -fsanitize=fuzzer and -DATOP_LIBFUZZER it is a
// target of libFuzzer.
//
// Every buffer lies alone on the heap and is exactly as long as launchers.h says, so that AddressSanitizer sees what is
// read or written beyond it. Every kernel runs twice, with outputs that were filled otherwise, on one thread and on
// four: the same bytes must come out, so that all were written, none was read before, and no result depends on the
// threads.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <tuple>
#include <type_traits>

#include "common/launchers.h"
#include "torch/csrc/stable/ops.h"

using namespace atop;

namespace {

struct Bytes {
  const uint8_t* data;
  size_t size, at = 0;

  uint8_t next() { return at < size ? data[at++] : 0; }
  int64_t upto(int64_t most) { return 1 + next() % most; }
};

template <typename T>
struct Buffer {
  std::unique_ptr<T[]> memory;
  int64_t count;

  explicit Buffer(int64_t count) : memory(new T[static_cast<size_t>(count)]), count(count) {}
  T* get() const { return memory.get(); }
  void fill(int byte) { std::memset(static_cast<void*>(get()), byte, static_cast<size_t>(count) * sizeof(T)); }
};

template <typename T>
Buffer<T> values(Bytes& in, int64_t count, int64_t high = 0) {
  Buffer<T> made(count);
  std::minstd_rand random(in.next() + 1u);
  const bool odd = in.next() % 4 == 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t word = static_cast<uint32_t>(random());
    const float plain = static_cast<float>(word % 2001) / 1000.0f - 1.0f;
    const float corners[] = {0.0f, -0.0f, 1e-42f, 3e38f, -3e38f, NAN, INFINITY, -INFINITY};
    made.get()[i] =
        high ? static_cast<T>(word % high) : static_cast<T>(odd && word % 16 == 0 ? corners[word / 16 % 8] : plain);
  }
  return made;
}

[[noreturn]] void fail(const char* name, const char* why) {
  std::fprintf(stderr, "%s: %s\n", name, why);
  std::abort();
}

// Runs `launch` on the outputs, twice; see above.
template <typename Launch, typename... T>
void check(const char* name, const Launch& launch, Buffer<T>&... outputs) {
  const auto run = [&](int threads, int byte) {
    torch::stable::threads = threads;
    (outputs.fill(byte), ...);
    if (const char* problem = launch()) fail(name, problem);
  };
  run(1, 0x11);
  const auto same = [&](auto& output) {
    using U = std::remove_reference_t<decltype(*output.get())>;
    Buffer<U> copy(output.count);
    std::memcpy(static_cast<void*>(copy.get()), output.get(), static_cast<size_t>(output.count) * sizeof(U));
    return copy;
  };
  auto kept = std::make_tuple(same(outputs)...);
  run(4, 0x7F);
  const auto differs = [](const auto& a, const auto& b) {
    for (int64_t i = 0; i < a.count; ++i) {
      const bool nan = a.get()[i] != a.get()[i] && b.get()[i] != b.get()[i];
      if (!nan && std::memcmp(&a.get()[i], &b.get()[i], sizeof(a.get()[i]))) return true;
    }
    return false;
  };
  const bool wrong = std::apply([&](const auto&... a) { return (differs(a, outputs) || ...); }, kept);
  if (wrong) fail(name, "a result that was not written, or that depends on the threads");
}

struct Keys {
  Buffer<int64_t> seed, ids, draws;
  Keys(Bytes& in, int64_t batch)
      : seed(values<int64_t>(in, 1, 1000)), ids(values<int64_t>(in, batch, 1000)), draws(values<int64_t>(in, 1, 9)) {}
  Key key() const { return {seed.get(), ids.get(), 1, draws.get(), 0}; }
};

Images images(Bytes& in) {
  const int64_t patch = in.upto(4);
  Images made{in.upto(3), in.upto(4), patch * in.upto(9), patch * in.upto(9), patch, 1, in.next() % 2 == 1};
  made.copies = static_cast<int>(in.upto(4));
  return made;
}

template <typename T>
void steps(Bytes& in) {
  const int64_t batch = in.upto(4), inner = in.upto(200), draws = in.upto(3), kind = in.next() % 4;
  const auto x = values<T>(in, batch * inner), x0 = values<T>(in, batch * inner), before = values<T>(in, batch * inner);
  const auto grad = values<T>(in, draws * batch * inner), eps = values<T>(in, batch, 2);
  Buffer<T> out(batch * inner);
  const bool own = in.next() % 2;
  StepArguments<T> a{x.get(),
                     grad.get(),
                     x0.get(),
                     before.get(),
                     out.get(),
                     nullptr,
                     nullptr,
                     draws,
                     batch * inner,
                     batch,
                     inner,
                     {nullptr, 0, T(0.1)},
                     {own ? eps.get() : nullptr, 1, T(0.3)},
                     {nullptr, 0, T(0.75)}};
  check(
      "step",
      [&] {
        return kind == 0   ? launch_pgd_step_linf(a, nullptr)
               : kind == 1 ? launch_pgd_step_l2(a, nullptr)
               : kind == 2 ? launch_apgd_step_linf(a, nullptr)
                           : launch_apgd_step_l2(a, nullptr);
      },
      out);
}

void gates(Bytes& in) {
  const Gates size{in.upto(3), in.upto(20), in.upto(100), in.next() % 2 == 1, in.next() % 2};
  const int64_t n = size.batch * size.channels * size.pixels;
  const auto h = values<float>(in, 2 * n), dy = values<float>(in, n), bias = values<float>(in, 2 * size.channels);
  Buffer<float> y(n), dh(2 * n), partials(gated_parts(size) * 2 * size.channels), db(2 * size.channels);
  check("gated", [&] { return launch_gated(h.get(), bias.get(), y.get(), size, nullptr); }, y);
  check(
      "gated_bwd",
      [&] {
        return launch_gated_bwd(dy.get(), h.get(), bias.get(), dh.get(), partials.get(), db.get(), size, nullptr);
      },
      dh, db);
}

void corrupt(Bytes& in) {
  const Images im = images(in);
  const int64_t height = in.next() % 2 ? im.height : in.upto(30), width = in.next() % 2 ? im.width : in.upto(30);
  const int64_t planes = im.batch * im.copies * (im.channels + 2) * im.pixels(),
                live = im.batch * im.channels * im.packed();
  const Keys keys(in, im.batch);
  const auto x = values<float>(in, im.batch * im.channels * height * width), sigma = values<float>(in, 1, 2);
  const auto owners = values<uint8_t>(in, im.batch * im.blocks(), im.copies + 1);
  const auto dy = values<float>(in, planes),
             stacked = values<float>(in, im.batch * im.copies * im.channels * im.pixels());
  Buffer<float> y(planes), dx(im.batch * im.channels * im.pixels()), joined(dx.count), parted(stacked.count);
  Buffer<uint8_t> bits(live);
  check(
      "corrupt",
      [&] {
        return launch_corrupt(x.get(), owners.get(), sigma.get(), 0, keys.key(), im, height, width, y.get(), bits.get(),
                              nullptr);
      },
      y, bits);
  check(
      "corrupt_bwd", [&] { return launch_corrupt_bwd(dy.get(), bits.get(), owners.get(), im, dx.get(), nullptr); }, dx);
  check("assemble", [&] { return launch_assemble(stacked.get(), owners.get(), im, joined.get(), nullptr); }, joined);
  check("assemble_bwd", [&] { return launch_assemble_bwd(dx.get(), owners.get(), im, parted.get(), nullptr); }, parted);
}

void randoms(Bytes& in) {
  const int64_t batch = in.upto(4), count = in.upto(255), blocks = in.upto(100);
  const Keys keys(in, batch);
  const auto masked = values<int64_t>(in, batch, blocks + 2);
  Buffer<float> y(batch * count);
  Buffer<uint8_t> owners(batch * blocks);
  check("random_normal", [&] { return launch_random_normal(keys.key(), y.get(), batch, count, 1, nullptr); }, y);
  check(
      "mask_blocks",
      [&] { return launch_mask_blocks(keys.key(), masked.get(), 1, owners.get(), batch, blocks, 3, nullptr); }, owners);
}

void losses(Bytes& in) {
  const int64_t batch = in.upto(40), classes = 3 + in.upto(60);
  const int kind = in.next() % 6;
  const auto z = values<float>(in, batch * classes);
  const auto labels = values<int64_t>(in, batch, classes + 1), targets = values<int64_t>(in, batch, classes + 1);
  const int64_t* aims = kind != 0 && kind != 4 && in.next() % 2 ? targets.get() : nullptr;
  Buffer<float> found(batch), gradient(batch * classes);
  Buffer<bool> correct(batch);
  check(
      "attack_loss",
      [&] {
        return launch_attack_loss(z.get(), labels.get(), aims, kind, found.get(), gradient.get(), correct.get(), batch,
                                  classes, nullptr);
      },
      found, gradient, correct);
}

void resample(Bytes& in) {
  const int64_t batch = in.upto(3), channels = in.upto(9), height = in.upto(20), width = in.upto(20);
  const int64_t rows = in.upto(30), columns = in.upto(30), taps = std::min<int64_t>({in.upto(4), height, width});
  const auto x = values<float>(in, batch * channels * height * width);
  const auto top = values<int64_t>(in, rows, height - taps + 1),
             left = values<int64_t>(in, batch * columns, width - taps + 1);
  const auto row = values<float>(in, rows * taps), column = values<float>(in, batch * columns * taps);
  const bool last = in.next() % 2;
  Buffer<float> y(batch * channels * rows * columns);
  check(
      "resample",
      [&] {
        return launch_resample(x.get(), Taps<float>{top.get(), row.get(), 0, rows, taps},
                               Taps<float>{left.get(), column.get(), columns, columns, taps}, y.get(), batch, channels,
                               height, width, last, nullptr);
      },
      y);
}

// The additional inputs of a convolution, in separate buffers.
struct Fusion {
  Buffer<float> mask, bias, residual;
  bool masked, shifted, added, relu;

  Fusion(Bytes& in, int64_t inputs, int64_t channels, int64_t outputs)
      : mask(values<float>(in, inputs)), bias(values<float>(in, channels)), residual(values<float>(in, outputs)) {
    const uint8_t which = in.next();
    masked = which & 1;
    shifted = which & 2;
    added = which & 4;
    relu = which & 8;
  }
  ConvFusion get() const {
    return {masked ? mask.get() : nullptr, shifted ? bias.get() : nullptr, added ? residual.get() : nullptr, relu};
  }
};

void convolution(Bytes& in) {
  const Conv3x3 size{in.upto(2), in.upto(40), in.upto(40), in.upto(13), in.upto(13), in.upto(5)};
  const int64_t pixels = size.batch * size.height * size.width, panels = (size.outputs + kConvPanel - 1) / kConvPanel;
  const auto x = values<float>(in, pixels * size.channels), dy = values<float>(in, pixels * size.outputs);
  const auto weight = values<float>(in, size.outputs * size.channels * 9);
  const Fusion fusion(in, x.count, size.outputs, dy.count);
  const int64_t strides[4] = {size.channels * 9, 9, 3, 1};
  Buffer<float> ready(36 * panels * size.channels * kConvPanel), y(pixels * size.outputs), dw(weight.count);
  check(
      "conv3x3_prepare",
      [&] { return launch_conv3x3_prepare(weight.get(), strides, size.outputs, size.channels, ready.get(), nullptr); },
      ready);
  check("conv3x3", [&] { return launch_conv3x3(x.get(), ready.get(), fusion.get(), size, y.get(), nullptr); }, y);
  check(
      "conv3x3_bwd_weight", [&] { return launch_conv3x3_bwd_weight(dy.get(), x.get(), size, dw.get(), nullptr); }, dw);
}

void strided_convolution(Bytes& in) {
  StridedConv size{};
  size.batch = in.upto(2);
  size.channels = in.upto(20);
  size.outputs = in.upto(40);
  size.stride = in.upto(3);
  size.padding = in.next() % 3;
  size.weight_rows = in.upto(5);
  size.weight_columns = in.upto(5);
  size.transposed = in.next() % 2;
  size.channels_last = size.transposed || in.next() % 2;
  size.y_channels_last = !size.transposed || in.next() % 2;
  // Images that are as large as the weights at least, and the outputs that go with them.
  const int64_t height = size.weight_rows + in.upto(12), width = size.weight_columns + in.upto(12);
  const int64_t rows = (height + 2 * size.padding - size.weight_rows) / size.stride + 1;
  const int64_t columns = (width + 2 * size.padding - size.weight_columns) / size.stride + 1;
  size.height = size.transposed ? rows : height;
  size.width = size.transposed ? columns : width;
  size.y_height = size.transposed ? height : rows;
  size.y_width = size.transposed ? width : columns;
  const auto x = values<float>(in, size.batch * size.height * size.width * size.channels);
  const auto prepared = values<float>(in, frozen_conv_weights(size));
  Buffer<float> y(size.batch * size.y_height * size.y_width * size.outputs);
  Fusion fusion(in, x.count, size.outputs, y.count);
  // The op gives gradients a mask, and images the rest.
  fusion.masked &= size.transposed;
  fusion.shifted &= !size.transposed;
  fusion.added &= !size.transposed;
  fusion.relu &= !size.transposed;
  check(
      "frozen_conv", [&] { return launch_frozen_conv(x.get(), prepared.get(), fusion.get(), size, y.get(), nullptr); },
      y);
}

void attention(Bytes& in) {
  const Attention size{in.upto(2), in.upto(20), in.upto(6), in.upto(6)};
  const int64_t places = size.rows * size.columns, n = size.batch * size.channels * 4 * places;
  const auto b = values<float>(in, n), dy = values<float>(in, n);
  const auto valid = values<bool>(in, size.batch * places, 2);
  const int64_t strides[4] = {size.channels * 4 * places, 4 * places, 2 * size.columns, 1};
  const auto of = [&](auto* first) {
    Strided<std::remove_pointer_t<decltype(first)>> made{first, {}};
    std::copy(strides, strides + 4, made.strides);
    return made;
  };
  Buffer<float> y(n), db(n);
  const float *features = b.get(), *upstream = dy.get();
  check(
      "contextual_attention",
      [&] { return launch_contextual_attention(of(features), valid.get(), size, of(y.get()), nullptr); }, y);
  check(
      "contextual_attention_bwd",
      [&] {
        return launch_contextual_attention_bwd(of(upstream), of(features), valid.get(), size, of(db.get()), nullptr);
      },
      db);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in{data, size};
  void (*const targets[])(Bytes&) = {steps<float>, steps<double>,       gates,    corrupt, randoms, losses, resample,
                                     convolution,  strided_convolution, attention};
  targets[in.next() % (sizeof(targets) / sizeof(targets[0]))](in);
  return 0;
}

#ifndef ATOP_LIBFUZZER
// program COUNT [SEED]: that many inputs of random bytes, always the same ones for a seed.
// program FILE...: the inputs in these files.
int main(int argc, char** argv) {
  uint8_t data[64];
  char* end = nullptr;
  const long count = argc > 1 ? std::strtol(argv[1], &end, 10) : 1000;
  if (end && *end) {
    for (int i = 1; i < argc; ++i) {
      std::FILE* file = std::fopen(argv[i], "rb");
      if (!file) fail(argv[i], "cannot be read");
      LLVMFuzzerTestOneInput(data, std::fread(data, 1, sizeof(data), file));
      std::fclose(file);
    }
    std::printf("%d files\n", argc - 1);
    return 0;
  }
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : 0u);
  for (long i = 0; i < count; ++i) {
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(data, sizeof(data));
  }
  std::printf("%ld inputs\n", count);
}
#endif
