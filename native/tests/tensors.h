// Tensors of the fuzz program, in memory of exactly their size, and how what is found is compared with what is expected.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../arguments.h"

namespace {

using Random = std::mt19937_64;
#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

int64_t pick(Random& random, std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
}
int64_t between(Random& random, int64_t least, int64_t most) { return least + int64_t(random() % uint64_t(most - least + 1)); }

const int64_t SIZES[] = {4, 2, 2, 8, 1};

void put(Type type, void* to, int64_t at, double x) {
    if (type == Type::float64) {
        static_cast<double*>(to)[at] = x;
    } else if (type == Type::float32) {
        static_cast<float*>(to)[at] = float(x);
    } else if (type == Type::int8) {
        static_cast<int8_t*>(to)[at] = int8_t(std::lround(std::fmax(-127.0, std::fmin(127.0, 40 * x))));
    } else if (type == Type::float16) {
        static_cast<Half*>(to)[at] = Half(x);
    } else {
        float f = float(x);
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        static_cast<uint16_t*>(to)[at] = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

double get(Type type, const void* from, int64_t at) {
    if (type == Type::float64) return static_cast<const double*>(from)[at];
    if (type == Type::float32) return static_cast<const float*>(from)[at];
    if (type == Type::int8) return double(static_cast<const int8_t*>(from)[at]);
    if (type == Type::float16) return double(static_cast<const Half*>(from)[at]);
    uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[at]) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

double rounded(Type type, double x) {
    alignas(8) char held[8];
    put(type, held, 0, x);
    return get(type, held, 0);
}

// A tensor (batch, heads, length, dim) with heads or positions outside, and room between rows; a scale for each row of int8.
struct Held {
    Type type;
    int64_t batch, heads, length, dim;
    Tensor tensor;
    std::unique_ptr<char[]> memory;
    std::unique_ptr<float[]> scales;

    Held(Random& random, Type type, int64_t batch, int64_t heads, int64_t length, int64_t dim)
        : type(type), batch(batch), heads(heads), length(length), dim(dim) {
        int64_t width = dim + pick(random, {0, 0, 3});
        bool positions_outside = random() % 2;
        int64_t row = positions_outside ? heads * width : width, head = positions_outside ? width : length * width;
        // The last row ends where its elements do.
        int64_t count = batch * heads * length * width - (width - dim);
        memory.reset(new char[count * SIZES[int(type)]]);
        tensor = {memory.get(), heads * length * width, head, row};
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < count; i++) put(type, memory.get(), i, normal(random));
        if (type != Type::int8) return;
        scales.reset(new float[batch * heads * length]);
        for (int64_t i = 0; i < batch * heads * length; i++) scales[i] = 0.01f + 0.001f * float(random() % 30);
    }

    int64_t at(int64_t b, int64_t h, int64_t i, int64_t d) const {
        return b * tensor.batch + h * tensor.head + i * tensor.row + d;
    }
    int64_t scale_at(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * length + i; }
    Tensor of_scales() const { return {scales.get(), heads * length, length, 1}; }
    // Row (b, h, i) in double.
    std::vector<double> row(int64_t b, int64_t h, int64_t i) const {
        std::vector<double> found(dim);
        for (int64_t d = 0; d < dim; d++) found[d] = get(type, memory.get(), at(b, h, i, d)) * (scales ? double(scales[scale_at(b, h, i)]) : 1.0);
        return found;
    }
    void poison(int64_t b, int64_t i) {
        for (int64_t h = 0; h < heads; h++) {
            if (scales) scales[scale_at(b, h, i)] = NAN;
            else for (int64_t d = 0; d < dim; d++) put(type, memory.get(), at(b, h, i, d), NAN);
        }
    }
};

// What an operation returned, and what it should have.
struct Compared {
    std::vector<double> found, expected, size;  // `size` is that of the terms that were summed

    // The error's norm over that of the terms.
    double error() const {
        double error = 0, norm = 1e-30;
        for (size_t i = 0; i < found.size(); i++) {
            if (found[i] == expected[i]) continue;  // infinities too
            double d = found[i] - expected[i];
            if (!(std::abs(d) <= 1e300)) return INFINITY;
            error += d * d;
        }
        for (double s : size) norm += std::isfinite(s) ? s * s : 0;
        return std::sqrt(error / norm);
    }
};

uint64_t mixed(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

}  // namespace
