//! What the simulated device costs: the verbs of churn, and copies and hashes beside their ceilings.

#![expect(clippy::unwrap_used, reason = "a benchmark")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use shoal_core::bytes::ByteCount;
use shoal_device::{
    Device, Frame, HostBuffer, Mapping, Reservation, SimDevice, SimOptions, Span, Stream, hash_bytes,
};

const EXTENT: ByteCount = ByteCount::mib(2);
const COPY: ByteCount = ByteCount::mib(64);
const SOON: Duration = Duration::from_secs(20);

fn open(dir: &tempfile::TempDir) -> Arc<dyn Device> {
    SimDevice::open_dyn(SimOptions::new(ByteCount::mib(512), dir.path())).unwrap()
}

fn churn(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let device = open(&dir);
    let reservation = Reservation::new(&device, EXTENT).unwrap();
    let frame = Frame::create(&device, EXTENT).unwrap();
    let mut group = c.benchmark_group("churn");
    group.bench_function("map_unmap", |b| {
        b.iter(|| Mapping::new(&reservation, ByteCount::ZERO, Arc::clone(&frame)).unwrap());
    });
    group.bench_function("create_destroy_2MiB", |b| b.iter(|| Frame::create(&device, EXTENT).unwrap()));
    // The ceiling of creating: 2 MiB of memory, zeroed.
    group.bench_function("zero_2MiB_memset", |b| {
        let mut bytes = vec![1_u8; 2 << 20];
        b.iter(|| black_box(&mut bytes).fill(0));
    });
    group.finish();
}

fn copies(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let device = open(&dir);
    let reservation = Reservation::new(&device, COPY).unwrap();
    let frame = Frame::create(&device, COPY).unwrap();
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, frame).unwrap();
    let buffer = HostBuffer::allocate(&device, COPY).unwrap();
    let stream = Stream::create(&device).unwrap();
    let host = || Span::host(&buffer, ByteCount::ZERO, COPY);
    let mut group = c.benchmark_group("copy_64MiB");
    group.throughput(Throughput::Bytes(COPY.0)).sample_size(20);
    group.bench_function("up", |b| {
        b.iter(|| {
            stream.copy(host(), Span::mapping(&mapping)).unwrap();
            stream.synchronize(SOON).unwrap()
        });
    });
    group.bench_function("down", |b| {
        b.iter(|| {
            stream.copy(Span::mapping(&mapping), host()).unwrap();
            stream.synchronize(SOON).unwrap()
        });
    });
    group.bench_function("hash", |b| {
        b.iter(|| stream.hash(Span::mapping(&mapping)).unwrap().wait(SOON).unwrap());
    });
    let source = vec![3_u8; 64 << 20];
    group.bench_function("ceiling_memcpy", |b| {
        let mut target = vec![0_u8; source.len()];
        b.iter(|| black_box(&mut target).copy_from_slice(black_box(&source)));
    });
    group.bench_function("ceiling_hash", |b| {
        b.iter_batched(|| (), |()| hash_bytes(black_box(&source)), BatchSize::SmallInput);
    });
    group.finish();
}

/// What a list costs its caller: 4,096 blocks of 64 bytes, so that hardly anything is copied.
fn lists(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let device = open(&dir);
    let reservation = Reservation::new(&device, COPY).unwrap();
    let frame = Frame::create(&device, COPY).unwrap();
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, frame).unwrap();
    let buffer = HostBuffer::allocate(&device, COPY).unwrap();
    let stream = Stream::create(&device).unwrap();
    let (count, bytes) = (4096, ByteCount(64));
    let blocks = (0..count).map(|index| {
        let (one, other) = (ByteCount(index * 7919 % count * 4096), ByteCount(index * 4096));
        (
            Span::host(&buffer, one, bytes),
            Span::Device { mapping: Arc::clone(&mapping), offset: other, bytes },
        )
    });
    let blocks: Vec<_> = blocks.collect();
    c.bench_function("copy_many/4096_blocks", |b| {
        b.iter(|| {
            stream.copy_many(&blocks).unwrap();
            stream.synchronize(SOON).unwrap()
        });
    });
}

criterion_group!(benches, churn, copies, lists);
criterion_main!(benches);
