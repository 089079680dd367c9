#include "common/half.h"

static inline uint16_t to_half(float v) {
  atop::Half h;
  atop::store(v, &h);
  return h.bits;
}

#define LEVEL v1
#define BYTES 16
#define VECTORS 2
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
#define FROM_HALF(h) \
  (Lanes<float>::Vector{load(Half{(h)[0]}), load(Half{(h)[1]}), load(Half{(h)[2]}), load(Half{(h)[3]})})
#define TO_HALF(v) (Shorts{to_half((v)[0]), to_half((v)[1]), to_half((v)[2]), to_half((v)[3])})
#include "cpu/gates.inc"
