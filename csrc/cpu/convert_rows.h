// Conversions for one ISA, and the table of them for the file that is compiled with its flags.
#pragma once

#include "sgld/convert.h"
#include "sgld/vec.h"

namespace sgld {

template <class V>
struct ConvertKernel {
  template <class From, class To>
  static void run(const void* from_any, void* to_any, int64_t count) {
    const From* from = static_cast<const From*>(from_any);
    To* to = static_cast<To*>(to_any);
    int64_t i = 0;
    for (; i + V::width <= count; i += V::width) V::load(from + i).store(to + i);
    if (i == count) return;
    From rest[V::width] = {};
    To found[V::width];
    memcpy(rest, from + i, static_cast<size_t>(count - i) * sizeof(From));
    V::load(rest).store(found);
    memcpy(to + i, found, static_cast<size_t>(count - i) * sizeof(To));
  }
};

template <class V>
constexpr Converts convert_table = {{
    {ConvertKernel<V>::template run<float, float>, ConvertKernel<V>::template run<float, bf16>,
     ConvertKernel<V>::template run<float, f16>},
    {ConvertKernel<V>::template run<bf16, float>, ConvertKernel<V>::template run<bf16, bf16>,
     ConvertKernel<V>::template run<bf16, f16>},
    {ConvertKernel<V>::template run<f16, float>, ConvertKernel<V>::template run<f16, bf16>,
     ConvertKernel<V>::template run<f16, f16>},
}};

}  // namespace sgld
