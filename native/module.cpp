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

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const InstructionSet& set : instruction_sets)
        if (set.runs_here()) names.push_back(set.name);
    return names;
}

const Kernels& kernels_of(const std::string& isa) {
    static const std::vector<std::string> here = available();
    for (const InstructionSet& set : instruction_sets)
        if (isa == set.name && std::find(here.begin(), here.end(), isa) != here.end()) return *set.kernels;
    throw nb::value_error(("instruction set " + isa + " does not run on this machine").c_str());
}

// Numbers in a merge from which on other threads of Python may run meanwhile: some 10 microseconds.
constexpr int64_t released_from = 1 << 16;

template <typename T> T* pointer(intptr_t address) { return reinterpret_cast<T*>(address); }

// How Python gives a field of arguments.h: a pointer as an address, a type as its number, a tensor as its address and its
// three strides, anything else as it is.
template <typename T> struct Given {
    using Type = T;
    static T to(Type x) { return x; }
    static Type from(T x) { return x; }
};
template <typename T> struct Given<T*> {
    using Type = intptr_t;
    static T* to(Type x) { return pointer<T>(x); }
    static Type from(T* x) { return reinterpret_cast<intptr_t>(x); }
};
template <> struct Given<::Type> {
    using Type = int;
    static ::Type to(Type x) { return ::Type(x); }
    static Type from(::Type x) { return int(x); }
};
template <> struct Given<Tensor> {
    using Type = std::tuple<intptr_t, int64_t, int64_t, int64_t>;
    static Tensor to(const Type& x) {
        return {pointer<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
    }
    static Type from(const Tensor& x) { return {reinterpret_cast<intptr_t>(x.data), x.batch, x.head, x.row}; }
};

template <typename S, typename T> struct Field {
    const char* name;
    T S::*member;
};

// A class of Python that is made from its fields by their names, all of them, and shows them.
template <typename S, typename... T> void bind(nb::module_& m, const char* name, Field<S, T>... fields) {
    nb::class_<S> bound(m, name);
    bound.def("__init__", [fields...](S* self, typename Given<T>::Type... values) {
        new (self) S{};
        ((self->*(fields.member) = Given<T>::to(values)), ...);
    }, nb::kw_only(), nb::arg(fields.name)...);
    (bound.def_prop_ro(fields.name, [fields](const S& self) { return Given<T>::from(self.*(fields.member)); }), ...);
}

// A function of Python for an operation that makes a state.
template <void (*Kernels::*OPERATION)(const Forward&)>
void forward(const std::string& isa, const Attention& attention, intptr_t out, intptr_t lse) {
    const Kernels& kernels = kernels_of(isa);
    Forward a{attention, pointer<void>(out), pointer<void>(lse)};
    nb::gil_scoped_release release;
    (kernels.*OPERATION)(a);
}

void backward(const std::string& isa, const Attention& attention, intptr_t d_out, intptr_t lse, intptr_t delta,
              intptr_t d_q, intptr_t d_k, intptr_t d_v) {
    const Kernels& kernels = kernels_of(isa);
    Backward a{attention};
    a.d_out = pointer<const void>(d_out), a.lse = pointer<const void>(lse), a.delta = pointer<const void>(delta);
    a.d_q = pointer<void>(d_q), a.d_k = pointer<void>(d_k), a.d_v = pointer<void>(d_v);
    nb::gil_scoped_release release;
    (a.segment == 0 ? kernels.backward : kernels.backward_tree)(a);
}

// Without an argument for the instruction set, the best is meant: a merge of a few rows takes less than finding it.
void merge(const Merge& m) {
    static const Kernels& best = kernels_of(available().front());
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
    m.def("instruction_sets", available, "The instruction sets that run on this machine, the best first.");
#define FIELD(name) Field<Attention, decltype(Attention::name)>{#name, &Attention::name}
    bind(m, "Attention", FIELD(type), FIELD(batch), FIELD(q_heads), FIELD(kv_heads), FIELD(q_len), FIELD(kv_len),
         FIELD(head_dim), FIELD(v_dim), FIELD(q), FIELD(k), FIELD(v), FIELD(k_scales), FIELD(v_scales), FIELD(pages),
         FIELD(pages_batch), FIELD(page_len), FIELD(lo), FIELD(hi), FIELD(bounds_batch), FIELD(scale), FIELD(softcap),
         FIELD(alibi_slopes), FIELD(dropout_p), FIELD(seed), FIELD(first_head), FIELD(rows), FIELD(keys),
         FIELD(diagonal), FIELD(diagonal_batch), FIELD(threads), FIELD(segment));
    m.def("prefill", forward<&Kernels::prefill>);
    m.def("decode", forward<&Kernels::decode>);
    m.def("tree", forward<&Kernels::tree>);
    m.def("backward", backward, nb::arg("isa"), nb::arg("attention"), nb::kw_only(), nb::arg("d_out"), nb::arg("lse"),
          nb::arg("delta"), nb::arg("d_q"), nb::arg("d_k"), nb::arg("d_v"));
    m.def("merge", merge_packed);
    m.def("merge_apart", merge_apart);
    m.def("pack", pack<true>);
    m.def("unpack", pack<false>);
    m.def("read_memory", read_memory);
    m.def("multiply_add", multiply_add);
}
