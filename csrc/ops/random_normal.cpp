#include <torch/csrc/stable/library.h>

#include <array>

#include "common/keys.h"

namespace atop {
namespace {

Tensor random_normal(const Tensor& seed, const Tensor& sample_ids, const Tensor& draws, int64_t tag, int64_t count) {
  const Key key = checked_key("random_normal", seed, sample_ids, draws);
  ATOP_CHECK(count >= 0, "random_normal", "count", "an integer and >= 0", text(count));
  ATOP_CHECK(tag >= 0 && tag <= 0xFFFF, "random_normal", "tag", "an integer and in [0, 65535]", text(tag));
  const std::array<int64_t, 2> sizes{sample_ids.size(0), count};
  Tensor y = torch::stable::empty(sizes, ScalarType::Float, std::nullopt, sample_ids.device());
  if (y.numel() == 0) return y;
  run_on_device_of(y, "random_normal", [&](void* stream) {
    return launch_random_normal(key, output<float>(y), sizes[0], count, static_cast<uint32_t>(tag), stream);
  });
  return y;
}

Tensor mask_blocks(const Tensor& seed, const Tensor& sample_ids, const Tensor& draws, const Tensor& masked,
                   int64_t blocks, int64_t copies) {
  const Key key = checked_key("mask_blocks", seed, sample_ids, draws);
  const int64_t batch = sample_ids.size(0);
  check_per_sample("mask_blocks", "masked", masked, ScalarType::Long, batch);
  check_on_device_of("mask_blocks", "masked", masked, "sample_ids", sample_ids);
  ATOP_CHECK(blocks >= 0, "mask_blocks", "blocks", "an integer and >= 0", text(blocks));
  ATOP_CHECK(copies >= 1 && copies <= 255, "mask_blocks", "copies", "an integer and in [1, 255]", text(copies));
  const std::array<int64_t, 2> sizes{batch, blocks};
  Tensor owners = torch::stable::empty(sizes, ScalarType::Byte, std::nullopt, sample_ids.device());
  if (owners.numel() == 0) return owners;
  run_on_device_of(owners, "mask_blocks", [&](void* stream) {
    return launch_mask_blocks(key, input<int64_t>(masked), per_sample_stride(masked), output<uint8_t>(owners), batch,
                              blocks, static_cast<int>(copies), stream);
  });
  return owners;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("random_normal", TORCH_BOX(&atop::random_normal));
  m.impl("mask_blocks", TORCH_BOX(&atop::mask_blocks));
}
