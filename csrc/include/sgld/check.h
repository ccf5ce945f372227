// Checks at the boundary. Sizes have names: the first tensor that uses a name fixes its value, and a tensor that
// disagrees is reported with the name, both values and itself.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "sgld/types.h"

namespace sgld {

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string shape_of(const View& view) {
  std::ostringstream text;
  text << '[';
  for (int i = 0; i < view.ndim; ++i) text << (i ? ", " : "") << view.sizes[i];
  text << ']';
  return text.str();
}

// One named size of one call.
struct Size {
  const char* name;
  int64_t value;
};

// The size of a dimension must be the named one, or 1 where a tensor broadcasts.
inline void check_size(const char* op, const char* tensor, const View& view, int dim, Size want,
                       bool may_broadcast = false) {
  const int64_t got = view.sizes[dim];
  if (got == want.value || (may_broadcast && got == 1)) return;
  fail(op, tensor, ' ', shape_of(view), " has size ", got, " in dimension ", dim, " where ",
       want.name, " is ", want.value);
}

}  // namespace sgld
