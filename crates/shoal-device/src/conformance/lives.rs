//! Cases of lifetimes and of threads.

use std::sync::Arc;
use std::thread;

use shoal_core::bytes::ByteCount;

use super::{Factory, SOON, content, download, mapped, pattern, upload, used, whole};
use crate::error::DeviceError;
use crate::owned::{Frame, HostBuffer, Mapping, Reservation, Span, Stream};

/// Children hold their parents, so any order will do.
pub(super) fn any_order_of_dropping_is_safe(factory: Factory<'_>) {
    let page = factory().info().granularity;
    for order in 0..24_usize {
        let device = factory();
        let held = used(&device);
        let (reservation, mapping) = mapped(&device, page);
        let (frame, stream) = (Arc::clone(mapping.frame()), Stream::create(&device).expect("stream"));
        let mut parts: Vec<Box<dyn Send>> =
            vec![Box::new(reservation), Box::new(mapping), Box::new(frame), Box::new(stream)];
        let mut rest = order;
        for left in (1..=4).rev() {
            drop(parts.remove(rest % left));
            rest /= left;
        }
        assert_eq!(used(&device), held, "order {order}");
        assert_eq!(device.take_errors(), [], "order {order}");
    }
}

/// Two device objects share no handle and no address.
pub(super) fn devices_are_independent(factory: Factory<'_>) {
    let (one, two) = (factory(), factory());
    let page = one.info().granularity;
    let (reservation, kept) = mapped(&one, page);
    let stream = Stream::create(&one).expect("stream");
    let expected = pattern(21, page);
    upload(&stream, &expected, &kept);
    let foreign = Frame::create(&two, page).expect("create");
    let refused = Mapping::new(&reservation, ByteCount::ZERO, foreign).map(|_| ());
    assert!(matches!(refused, Err(DeviceError::UnknownHandle { .. })), "{refused:?}");
    let refused = two.unmap(kept.address(), page);
    assert!(matches!(refused, Err(DeviceError::NotMapped { .. })), "{refused:?}");
    let refused = two.release(reservation.address(), page);
    assert!(matches!(refused, Err(DeviceError::NotReserved { .. })), "{refused:?}");
    let (_other, other) = mapped(&two, page);
    let refused = stream.copy(Span::mapping(&other), Span::mapping(&kept));
    assert!(matches!(refused, Err(DeviceError::UnknownHandle { .. })), "{refused:?}");
    assert!(download(&stream, &kept) == expected);
}

/// Every verb from many threads at once; nothing is left and nothing is mixed up.
pub(super) fn many_threads(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let held = used(&device);
    let reservation = Reservation::new(&device, ByteCount(page.0 * 8)).expect("reserve");
    thread::scope(|scope| {
        for slot in 0..4_u64 {
            let (device, reservation) = (&device, &reservation);
            scope.spawn(move || {
                let stream = Stream::create(device).expect("stream");
                let host = HostBuffer::allocate(device, page).expect("host buffer");
                for round in 0..12_u64 {
                    let frame = Frame::create(device, page).expect("create");
                    let offset = ByteCount(page.0 * (slot * 2 + round % 2));
                    let mapping = Mapping::new(reservation, offset, frame).expect("map");
                    let expected = pattern(slot * 1000 + round, page);
                    host.write(ByteCount::ZERO, &expected).expect("write");
                    stream.copy(whole(&host), Span::mapping(&mapping)).expect("copy up");
                    let ticket = stream.hash(Span::mapping(&mapping)).expect("hash");
                    stream.copy(Span::mapping(&mapping), whole(&host)).expect("copy down");
                    drop(mapping);
                    assert!(stream.synchronize(SOON).expect("synchronize"));
                    assert_eq!(ticket.wait(SOON).expect("hash"), crate::hash_bytes(&expected));
                    assert!(content(&host) == expected, "slot {slot} round {round}");
                }
            });
        }
    });
    assert_eq!(used(&device), held);
    assert_eq!(device.take_errors(), []);
}
