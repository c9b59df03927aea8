// The Python module: which instruction sets run here, and the operations compiled for each.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "arguments.h"
#include "machine.h"

#define DECLARE(isa) namespace isa { extern const Kernels kernels; }
SHARDSUM_EACH_ISA(DECLARE)

namespace {

namespace nb = nanobind;

struct InstructionSet {
    const char* name;
    bool (*runs_here)();
    const Kernels* kernels;
};

#define ROW(isa) {#isa, runs_here::isa, &isa::kernels},
const InstructionSet instruction_sets[] = {SHARDSUM_EACH_ISA(ROW)};

std::vector<std::string> that_run_here() {
    std::vector<std::string> names;
    for (const InstructionSet& set : instruction_sets)
        if (set.runs_here()) names.push_back(set.name);
    return names;
}

const Kernels& kernels_of(const std::string& isa) {
    static const std::vector<std::string> here = that_run_here();
    for (const InstructionSet& set : instruction_sets)
        if (isa == set.name && std::find(here.begin(), here.end(), isa) != here.end()) return *set.kernels;
    throw nb::value_error(("instruction set " + isa + " does not run on this machine").c_str());
}

// Numbers in a merge from which on other threads of Python may run meanwhile: some 10 microseconds.
constexpr int64_t released_from = 1 << 16;

template <typename T> T* pointer(intptr_t address) { return reinterpret_cast<T*>(address); }

// What kernels/compiled.py hands over: addresses and strides, checked there.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using Strided = std::tuple<intptr_t, int64_t, int64_t, int64_t>;
using Bounds = std::tuple<intptr_t, intptr_t, int64_t>;
using Scores = std::tuple<double, double, intptr_t, double, uint64_t, int64_t, intptr_t, intptr_t, intptr_t, int64_t>;

using Table = std::tuple<intptr_t, int64_t, int64_t>;
using Storage = std::tuple<Strided, Strided, Table>;  // scales of keys and of values, pages; addresses are 0 without
using Gradient = std::tuple<intptr_t, intptr_t, intptr_t>;

Tensor tensor(const Strided& t) {
    return {pointer<const void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

Attention attention(int type, const Sizes& sizes, const Strided& q, const Strided& k, const Strided& v,
                    const Storage& storage, const Bounds& bounds, const Scores& scores, int threads, int64_t segment) {
    Attention a{};
    a.type = Type(type);
    std::tie(a.batch, a.q_heads, a.kv_heads, a.q_len, a.kv_len, a.head_dim, a.v_dim) = sizes;
    a.q = tensor(q), a.k = tensor(k), a.v = tensor(v);
    a.k_scales = tensor(std::get<0>(storage)), a.v_scales = tensor(std::get<1>(storage));
    intptr_t pages;
    std::tie(pages, a.pages_batch, a.page_len) = std::get<2>(storage);
    a.pages = pointer<const int64_t>(pages);
    a.lo = pointer<const int64_t>(std::get<0>(bounds)), a.hi = pointer<const int64_t>(std::get<1>(bounds));
    a.bounds_batch = std::get<2>(bounds);
    intptr_t slopes, rows, keys, own;
    std::tie(a.scale, a.softcap, slopes, a.dropout_p, a.seed, a.first_head, rows, keys, own, a.own_batch) = scores;
    a.alibi_slopes = pointer<const double>(slopes);
    a.rows = pointer<const int64_t>(rows), a.keys = pointer<const int64_t>(keys), a.own = pointer<const int64_t>(own);
    a.threads = threads, a.segment = segment;
    return a;
}

// A function of Python for an operation that makes a state.
template <void (*Kernels::*OPERATION)(const Forward&)>
void forward(const std::string& isa, int type, const Sizes& sizes, const Strided& q, const Strided& k,
             const Strided& v, const Storage& storage, const Bounds& bounds, const Scores& scores, int threads,
             int64_t segment, intptr_t out, intptr_t lse) {
    const Kernels& kernels = kernels_of(isa);
    Forward a{attention(type, sizes, q, k, v, storage, bounds, scores, threads, segment), pointer<void>(out),
              pointer<void>(lse)};
    nb::gil_scoped_release release;
    (kernels.*OPERATION)(a);
}

void backward(const std::string& isa, int type, const Sizes& sizes, const Strided& q, const Strided& k,
              const Strided& v, const Storage& storage, const Bounds& bounds, const Scores& scores, int threads,
              int64_t segment, const Gradient& given, const Gradient& found) {
    const Kernels& kernels = kernels_of(isa);
    Backward a{attention(type, sizes, q, k, v, storage, bounds, scores, threads, segment)};
    auto [d_out, lse, delta] = given;
    auto [d_q, d_k, d_v] = found;
    a.d_out = pointer<const void>(d_out), a.lse = pointer<const void>(lse), a.delta = pointer<const void>(delta);
    a.d_q = pointer<void>(d_q), a.d_k = pointer<void>(d_k), a.d_v = pointer<void>(d_v);
    nb::gil_scoped_release release;
    (segment == 0 ? kernels.backward : kernels.backward_tree)(a);
}

// Without an argument for the instruction set, the best is meant: a merge of a few rows takes less than finding it.
void merge(const Merge& m) {
    static const Kernels& best = kernels_of(that_run_here().front());
    if (m.rows * m.width < released_from) return best.merge(m);
    nb::gil_scoped_release release;
    best.merge(m);
}

void merge_packed(int type, int64_t rows, int64_t width, intptr_t a, intptr_t b, intptr_t into) {
    const intptr_t lse = into + (width - 1) * (Type(type) == Type::float64 ? 8 : 4);
    merge({Type(type), pointer<void>(a), pointer<void>(b), pointer<void>(into), pointer<void>(lse), rows, width, width, width, width});
}

// To a state whose rows lie one behind the other.
void merge_apart(int type, int64_t rows, int64_t width, intptr_t a, intptr_t b, intptr_t out, intptr_t lse) {
    merge({Type(type), pointer<void>(a), pointer<void>(b), pointer<void>(out), pointer<void>(lse), rows, width, width, width - 1, 1});
}

// The rows of a state and its packed form.
template <bool PACKING, typename T> void pack_rows(T* out, T* lse, T* packed, int64_t rows, int64_t v_dim) {
    for (int64_t row = 0; row < rows; ++row, out += v_dim, packed += v_dim + 1) {
        std::memcpy(PACKING ? packed : out, PACKING ? out : packed, v_dim * sizeof(T));
        (PACKING ? packed[v_dim] : lse[row]) = PACKING ? lse[row] : packed[v_dim];
    }
}

template <bool PACKING> void pack(int type, int64_t rows, int64_t width, intptr_t packed, intptr_t out, intptr_t lse) {
    if (Type(type) == Type::float64) pack_rows<PACKING>(pointer<double>(out), pointer<double>(lse), pointer<double>(packed), rows, width - 1);
    else pack_rows<PACKING>(pointer<float>(out), pointer<float>(lse), pointer<float>(packed), rows, width - 1);
}

double read_memory(const std::string& isa, intptr_t data, int64_t count, int threads) {
    nb::gil_scoped_release release;
    return kernels_of(isa).read_memory(pointer<const float>(data), count, threads);
}

double multiply_add(const std::string& isa, bool of_bfloat16, int64_t rounds, int threads) {
    nb::gil_scoped_release release;
    return kernels_of(isa).multiply_add(of_bfloat16, rounds, threads);
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("instruction_sets", that_run_here, "The instruction sets that run on this machine, the best first.");
    m.def("prefill", forward<&Kernels::prefill>);
    m.def("decode", forward<&Kernels::decode>);
    m.def("tree", forward<&Kernels::tree>);
    m.def("backward", backward);
    m.def("merge", merge_packed);
    m.def("merge_apart", merge_apart);
    m.def("pack", pack<true>);
    m.def("unpack", pack<false>);
    m.def("read_memory", read_memory);
    m.def("multiply_add", multiply_add);
}
